"""Checkpoints: headers that are read and refused, folders that are written whole or not at all,
models that come from the Hub.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.bad_folders import GOOD, HTML, LFS, entry, safetensors
from support.hub_server import COMMIT, HubServer

from qtool.checkpoint import (
    digest_files,
    open_checkpoint,
    read_json,
    resolve_model,
    stage_output,
    staging_folder,
    writer,
)
from qtool.checkpoint.header import read_header
from qtool.checkpoint.model import DTYPE_BITS
from qtool.checkpoint.strict_json import MAX_JSON_BYTES
from qtool.errors import CheckpointRefused, OutputTaken, ResourceError, UsageError

# Reading


@pytest.fixture
def folder(tmp_path):
    """A function that writes a model folder: name -> bytes, text or what becomes JSON."""

    def make(files: dict[str, object], *, config: object = None) -> Path:
        path = tmp_path / "model"
        path.mkdir()
        for name, content in {"config.json": {} if config is None else config, **files}.items():
            (path / name).write_bytes(
                content if isinstance(content, bytes) else json.dumps(content).encode()
            )
        return path

    return make


def refusal(path: Path) -> CheckpointRefused:
    with pytest.raises(CheckpointRefused) as caught:
        open_checkpoint(path)
    assert caught.value.hint
    assert len(caught.value.message) < 6000  # a path may have 4096 bytes
    return caught.value


def test_the_tiny_model_is_read_as_safetensors_reads_it(tiny_model):
    from safetensors import safe_open

    checkpoint = open_checkpoint(tiny_model)
    with safe_open(tiny_model / "model.safetensors", "pt") as file:
        assert set(checkpoint.tensors) == set(file.keys())
        for name, tensor in checkpoint.tensors.items():
            expected = file.get_tensor(name)
            assert tensor.shape == tuple(expected.shape)
            assert tensor.count == expected.numel()
            assert checkpoint.read(name) == expected.view(torch.uint8).numpy().tobytes()
    assert checkpoint.name == "tiny-python-llama"
    assert checkpoint.tied_embeddings
    assert checkpoint.quantization_config is None
    assert checkpoint.weight_files == (tiny_model / "model.safetensors",)
    assert (
        checkpoint.size_bytes
        == sum(tensor.size_bytes for tensor in checkpoint.tensors.values())
        > 11e6
    )


def test_every_dtype_that_torch_writes_is_read(folder):
    kinds = [
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.uint16,
        torch.int16,
        torch.float16,
        torch.bfloat16,
        torch.uint32,
        torch.int32,
        torch.float32,
    ]
    kinds += [torch.uint64, torch.int64, torch.float64, torch.complex64]
    kinds += [
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.float8_e8m0fnu,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2fnuz,
    ]
    path = folder({})
    save_file(
        {str(kind): torch.zeros(3, 5, dtype=kind) for kind in kinds}, path / "model.safetensors"
    )
    checkpoint = open_checkpoint(path)
    assert {tensor.dtype for tensor in checkpoint.tensors.values()} == set(DTYPE_BITS) - {
        "F4",
        "F6_E2M3",
        "F6_E3M2",
    }
    assert all(tensor.shape == (3, 5) for tensor in checkpoint.tensors.values())


def test_empty_tensors_and_scalars_are_read(folder):
    path = folder({})
    save_file(
        {"none": torch.zeros(0, 4), "one": torch.tensor(3.0), "also none": torch.zeros(0)},
        path / "model.safetensors",
        {"format": "pt"},
    )
    assert {name: tensor.count for name, tensor in open_checkpoint(path).tensors.items()} == {
        "none": 0,
        "one": 1,
        "also none": 0,
    }


def test_shards_are_read_through_their_index(folder):
    path = folder(
        {
            "model.safetensors.index.json": {
                "weight_map": {"a": "x-1.safetensors", "b": "x-2.safetensors"}
            }
        }
    )
    save_file({"a": torch.ones(2)}, path / "x-1.safetensors")
    save_file({"b": torch.ones(3)}, path / "x-2.safetensors")
    save_file({"c": torch.ones(3)}, path / "not-in-the-index.safetensors")
    checkpoint = open_checkpoint(path)
    assert set(checkpoint.tensors) == {"a", "b"}
    assert [file.name for file in checkpoint.weight_files] == ["x-1.safetensors", "x-2.safetensors"]


def test_a_file_beside_model_safetensors_is_not_part_of_the_model(folder):
    path = folder({})
    save_file({"a": torch.ones(2)}, path / "model.safetensors")
    save_file({"a": torch.ones(2)}, path / "consolidated.safetensors")
    assert open_checkpoint(path).weight_files == (path / "model.safetensors",)


@pytest.mark.parametrize(
    "length", [0x3C, 0x3C20, 0x3C0A, 0x20 | 0x3C << 16, int.from_bytes(b"v\0\0", "little")]
)
def test_a_header_whose_length_looks_like_text_is_read(tmp_path, length):
    text = json.dumps({"w": entry("U8", [4], 0, 4)}).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(safetensors(text.ljust(length), b"data"))
    assert read_header(file)["w"].offset == 8 + length


def test_a_folder_of_the_hub_cache_is_named_after_its_repository(tmp_path, tiny_model):
    path = tmp_path / "models--org--Qwen3-8B" / "snapshots" / COMMIT
    path.parent.mkdir(parents=True)
    path.symlink_to(tiny_model)
    assert open_checkpoint(path).name == "tiny-python-llama"
    path.unlink()
    shutil.copytree(tiny_model, path, ignore=shutil.ignore_patterns("*.jsonl"))
    assert open_checkpoint(path).name == "Qwen3-8B"


def test_no_folder_a_file_and_a_folder_without_config_are_told_apart(tmp_path, calibration_file):
    found = {
        refusal(path).code: refusal(path).message
        for path in (tmp_path / "none", calibration_file, tmp_path)
    }
    assert set(found) == {"E_NO_MODEL", "E_NOT_A_FOLDER", "E_NOT_A_MODEL"}
    assert refusal(tmp_path / ("x" * 5000)).code == "E_UNREADABLE"


def test_a_link_in_a_circle_is_no_folder(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert refusal(tmp_path / "loop").code in ("E_NO_MODEL", "E_UNREADABLE")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission_is_named(folder):
    path = folder({"model.safetensors": safetensors(GOOD, bytes(16))})
    (path / "model.safetensors").chmod(0)
    assert "model.safetensors" in refusal(path).message


BAD_FILES = {  # one file, model.safetensors -> code, part of the message
    "truncated data": (safetensors(GOOD, bytes(15)), "E_TRUNCATED", "b.weight"),
    "truncated header": (safetensors(GOOD)[:40], "E_HEADER_LENGTH", "header of"),
    "seven bytes": (bytes(7), "E_HEADER_SHORT", "7 bytes"),
    "nothing": (b"", "E_HEADER_SHORT", "0 bytes"),
    "overlap": (
        safetensors({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 2, 6)}, bytes(6)),
        "E_OVERLAP",
        "`b` at byte",
    ),
    "same place": (
        safetensors({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 0, 4)}, bytes(4)),
        "E_OVERLAP",
        "overlaps `a`",
    ),
    "hole": (
        safetensors({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 5, 9)}, bytes(9)),
        "E_HOLE",
        "leaves a hole after `a`",
    ),
    "hole in front": (
        safetensors({"a": entry("U8", [4], 1, 5)}, bytes(5)),
        "E_HOLE",
        "leaves a hole after the header",
    ),
    "bytes behind": (safetensors(GOOD, bytes(17)), "E_TRAILING_BYTES", "1 bytes behind"),
    "wrong size": (
        safetensors({"a": entry("F32", [2], 0, 4)}, bytes(4)),
        "E_HEADER_SIZE",
        "needs 8 bytes and is given 4",
    ),
    "unknown dtype": (
        safetensors({"a": entry("F128", [1], 0, 16)}, bytes(16)),
        "E_HEADER_DTYPE",
        "'F128'",
    ),
    "dtype that is a list": (
        safetensors({"a": entry(["F32"], [1], 0, 4)}, bytes(4)),
        "E_HEADER_DTYPE",
        "dtype",
    ),
    "dtype that is missing": (
        safetensors({"a": {"shape": [], "data_offsets": [0, 4]}}, bytes(4)),
        "E_HEADER_FIELDS",
        "data_offsets",
    ),
    "negative shape": (
        safetensors({"a": entry("U8", [-1, -4], 0, 4)}, bytes(4)),
        "E_HEADER_SHAPE",
        "[-1, -4]",
    ),
    "shape of true": (
        safetensors({"a": entry("U8", [True], 0, 1)}, bytes(1)),
        "E_HEADER_SHAPE",
        "[True]",
    ),
    "shape of fractions": (
        safetensors({"a": entry("U8", [1.0], 0, 1)}, bytes(1)),
        "E_HEADER_SHAPE",
        "[1.0]",
    ),
    "shape of many dimensions": (
        safetensors({"a": entry("U8", [1 << 61] * 100_000, 0, 1)}, bytes(1)),
        "E_HEADER_SHAPE",
        "shape",
    ),
    "shape beyond 64 bits": (
        safetensors({"a": entry("U8", [1 << 61] * 4, 0, 1)}, bytes(1)),
        "E_HEADER_SIZE",
        "needs",
    ),
    "shape of a huge number": (
        safetensors(
            b'{"a":{"dtype":"U8","shape":[1%s],"data_offsets":[0,1]}}' % (b"0" * 5000), bytes(1)
        ),
        "E_JSON_NUMBER",
        "",
    ),
    "negative offset": (
        safetensors({"a": entry("U8", [4], -4, 0)}, bytes(4)),
        "E_HEADER_OFFSETS",
        "[-4, 0]",
    ),
    "backward offsets": (
        safetensors({"a": entry("U8", [4], 4, 0)}, bytes(4)),
        "E_HEADER_OFFSETS",
        "[4, 0]",
    ),
    "offsets beyond the file": (
        safetensors({"a": entry("U8", [1 << 50], 0, 1 << 50)}, bytes(4)),
        "E_TRUNCATED",
        "4 bytes of data",
    ),
    "three offsets": (
        safetensors({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 2, 4]}}, bytes(4)),
        "E_HEADER_OFFSETS",
        "[0, 2, 4]",
    ),
    "name with a terminal command": (
        safetensors({"a\x1b[31m": entry("U8", [1], 0, 1)}, bytes(1)),
        "E_HEADER_NAME",
        "'a\\x1b[31m'",
    ),
    "name of half a character": (
        safetensors({"\ud800": entry("U8", [1], 0, 1)}, bytes(1)),
        "E_JSON_SURROGATE",
        "U+D800",
    ),
    "entry that is a list": (
        safetensors({"a": ["F32", [1], 0, 4]}, bytes(4)),
        "E_HEADER_ENTRY",
        "described by",
    ),
    "entry that is long": (
        safetensors({"a": ["x" * 100_000] * 9}, bytes(4)),
        "E_HEADER_ENTRY",
        "described by",
    ),
    "duplicate key": (
        safetensors(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{}}', bytes(1)),
        "E_JSON_DUPLICATE",
        "`a` appears twice",
    ),
    "duplicate inner key": (
        safetensors(b'{"a":{"dtype":"U8","dtype":"I8","shape":[1]}}', bytes(1)),
        "E_JSON_DUPLICATE",
        "`dtype` appears twice",
    ),
    "header that is a list": (safetensors([1]), "E_HEADER_START", "opening brace"),
    "header that is no JSON": (safetensors(b"{]"), "E_JSON_SYNTAX", "not JSON"),
    "header in UTF-16": (
        safetensors(json.dumps(GOOD).encode("utf-16"), bytes(16)),
        "E_HEADER_START",
        "opening brace",
    ),
    "header in Latin-1": (
        safetensors(b'{"caf\xe9":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', bytes(1)),
        "E_JSON_ENCODING",
        "not JSON",
    ),
    "header nested deeply": (
        safetensors(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
        "E_JSON_DEEP",
        "nested too deeply",
    ),
    "header beyond the file": (
        safetensors(GOOD, bytes(16), length=1 << 40),
        "E_HEADER_LENGTH",
        "1,099,511,627,776",
    ),
    "header of nothing": (safetensors(b""), "E_HEADER_EMPTY", "header of 0 bytes"),
    "no tensor": (
        safetensors({"__metadata__": {"format": "pt"}}),
        "E_NO_TENSORS",
        "no tensor inside",
    ),
    "LFS pointer": (LFS, "E_LFS_POINTER", "Git LFS pointer"),
    "HTML": (HTML, "E_NOT_SAFETENSORS", "HTML page"),
    "HTML with space in front": (b"\r\n  " + HTML, "E_NOT_SAFETENSORS", "HTML page"),
    "zip": (b"PK\x03\x04" + bytes(100), "E_PICKLE", "104 bytes"),
    "pickle": (b"\x80\x02}q\x00X\x01\x00\x00\x00aq\x01K\x01s." * 9, "E_PICKLE", "a pickle"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_refused_with_its_name_and_the_numbers(folder, case):
    content, code, message = BAD_FILES[case]
    error = refusal(folder({"model.safetensors": content}))
    assert (error.code, message in error.message) == (code, True), error.message
    assert "model.safetensors" in error.message


def test_a_huge_header_is_refused_without_reading_it(folder):
    path = folder({})
    with (path / "model.safetensors").open("wb") as file:
        file.write((1 << 38).to_bytes(8, "little"))
        file.truncate(1 << 39)  # a hole: half a terabyte that takes no space
    error = refusal(path)
    assert error.code == "E_JSON_SIZE"
    assert f"{MAX_JSON_BYTES:,}" in error.message


BAD_FOLDERS = {  # files -> code, part of the message
    "empty": ({}, "E_NO_WEIGHTS", "no safetensors file"),
    "only pickles": (
        {"pytorch_model.bin": b"\x80", "tokenizer.json": {}},
        "E_PICKLE",
        "pytorch_model.bin",
    ),
    "hidden file": (
        {".model.safetensors": safetensors(GOOD, bytes(16))},
        "E_NO_WEIGHTS",
        "no safetensors file",
    ),
    "index without map": (
        {"model.safetensors.index.json": {"metadata": {}}},
        "E_INDEX_MAP",
        "`weight_map`",
    ),
    "index with an empty map": (
        {"model.safetensors.index.json": {"weight_map": {}}},
        "E_INDEX_MAP",
        "`weight_map`",
    ),
    "index with a list": (
        {"model.safetensors.index.json": {"weight_map": ["a"]}},
        "E_INDEX_MAP",
        "`weight_map`",
    ),
    "index to the parent": (
        {"model.safetensors.index.json": {"weight_map": {"a": "../other.safetensors"}}},
        "E_INDEX_PATH",
        "of this folder",
    ),
    "index to the root": (
        {"model.safetensors.index.json": {"weight_map": {"a": "/etc/x.safetensors"}}},
        "E_INDEX_PATH",
        "of this folder",
    ),
    "index to a subfolder": (
        {"model.safetensors.index.json": {"weight_map": {"a": "sub/x.safetensors"}}},
        "E_INDEX_PATH",
        "of this folder",
    ),
    "index to a pickle": (
        {"model.safetensors.index.json": {"weight_map": {"a": "pytorch_model.bin"}}},
        "E_INDEX_SUFFIX",
        "not a safetensors file",
    ),
    "index to a number": (
        {"model.safetensors.index.json": {"weight_map": {"a": 1}}},
        "E_INDEX_TYPE",
        "not a file name",
    ),
    "index to a long name": (
        {"model.safetensors.index.json": {"weight_map": {"a": "x" * 4000 + ".safetensors"}}},
        "E_INDEX_PATH",
        "xxx",
    ),
    "index to no name": (
        {"model.safetensors.index.json": {"weight_map": {"a": "\0.safetensors"}}},
        "E_INDEX_PATH",
        "",
    ),
    "missing shard": (
        {"model.safetensors.index.json": {"weight_map": {"a": "x.safetensors"}}},
        "E_MISSING_SHARD",
        "x.safetensors",
    ),
    "index of another tensor": (
        {
            "model.safetensors.index.json": {"weight_map": {"c.weight": "x.safetensors"}},
            "x.safetensors": safetensors(GOOD, bytes(16)),
        },
        "E_INDEX_TENSOR",
        "`c.weight` is not in x.safetensors",
    ),
    "tensor in two shards": (
        {
            "x-1.safetensors": safetensors(GOOD, bytes(16)),
            "x-2.safetensors": safetensors(GOOD, bytes(16)),
        },
        "E_DUPLICATE",
        "x-1.safetensors and in x-2.safetensors",
    ),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_bad_folder_is_refused(folder, case):
    files, code, message = BAD_FOLDERS[case]
    error = refusal(folder(files))
    assert (error.code, message in error.message) == (code, True), error.message


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "model.safetensors.index.json"]
)
@pytest.mark.parametrize("kind", ["fifo", "folder"])
def test_what_is_no_regular_file_is_refused_at_once(folder, name, kind):
    path = folder({"model.safetensors": safetensors(GOOD, bytes(16))})
    for taken in (name, "model.safetensors") if name.endswith("index.json") else (name,):
        (path / taken).unlink(missing_ok=True)
    os.mkfifo(path / name) if kind == "fifo" else (path / name).mkdir()
    error = refusal(path)
    assert error.code == "E_NOT_A_FILE"
    assert name in error.message


@pytest.mark.parametrize(
    ("config", "code"),
    [
        (b"", "E_JSON_EMPTY"),
        (b"[]", "E_JSON_TYPE"),
        (b"{", "E_JSON_SYNTAX"),
        (b"null", "E_JSON_TYPE"),
        (b'{"a": 1, "a": 2}', "E_JSON_DUPLICATE"),
        (b"\xef\xbb\xbf{}", "E_JSON_SYNTAX"),
        (b"\xff", "E_JSON_ENCODING"),
        (HTML, "E_JSON_HTML"),
        (LFS, "E_LFS_POINTER"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "E_JSON_DEEP"),
    ],
)
def test_a_config_that_is_no_json_object_is_refused(folder, config, code):
    error = refusal(folder({"model.safetensors": safetensors(GOOD, bytes(16))}, config=config))
    assert error.code == code
    assert "config.json" in error.message


def test_a_config_of_gigabytes_is_refused_without_reading_it(folder):
    path = folder({})
    with (path / "config.json").open("wb") as file:
        file.truncate(1 << 40)
    assert refusal(path).code == "E_JSON_SIZE"
    with pytest.raises(CheckpointRefused, match="is missing"):
        read_json(path / "none.json")


@pytest.mark.parametrize(
    ("files", "config"),
    [
        ({}, {"quantization_config": {"quant_method": "gptq"}}),
        ({}, {"text_config": {"quantization_config": {"quant_method": "gptq"}}}),
        ({}, {"compression_config": {"quant_method": "gptq"}}),
        ({"quantize_config.json": {"quant_method": "gptq"}}, {}),
        ({"hf_quant_config.json": {"quant_method": "gptq"}}, {}),
    ],
)
def test_a_quantized_model_is_recognized_wherever_it_says_so(folder, files, config):
    path = folder({"model.safetensors": safetensors(GOOD, bytes(16)), **files}, config=config)
    assert open_checkpoint(path).quantization_config == {"quant_method": "gptq"}


names = st.text(max_size=6) | st.sampled_from(
    ("__metadata__", "a.weight", "a.weight", "dtype", "shape", "data_offsets")
)
numbers = st.integers(-2, 20) | st.sampled_from((1 << 61, 1 << 62, 1 << 64, -(1 << 63), 10**400))
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(sorted(DTYPE_BITS))
        | st.text(max_size=3)
        | st.none()
        | st.lists(st.none(), max_size=1),
        "shape": st.lists(numbers, max_size=4) | st.none() | st.text(max_size=2),
        "data_offsets": st.lists(numbers, max_size=3) | st.none() | st.floats(),
    }
)
headers = st.dictionaries(
    names,
    entries | st.recursive(st.none() | numbers | st.text(max_size=3), st.lists, max_leaves=4),
    max_size=4,
)


def read_or_refused(path: Path) -> bool:
    """Whether the header was read; anything but a refusal fails the test."""
    try:
        tensors = read_header(path)
    except CheckpointRefused as error:
        str(error).encode("utf-8", "backslashreplace")
        return False
    assert sum(tensor.size_bytes for tensor in tensors.values()) <= path.stat().st_size - 8
    return True


@given(st.binary(max_size=200))
@example(b"\x02" + bytes(7) + b"{}")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_bytes_are_refused_and_nothing_else(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    read_or_refused(tmp_path / "x")


@pytest.mark.slow
@given(headers, st.binary(max_size=40), st.integers(-3, 3))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_header_is_read_or_refused(tmp_path, header, data, error):
    text = json.dumps(header).encode()
    (tmp_path / "x").write_bytes(safetensors(text, data, length=max(0, len(text) + error)))
    read_or_refused(tmp_path / "x")


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
def test_a_true_file_with_bytes_changed_is_read_or_refused(tmp_path, data):
    content = bytearray(safetensors(GOOD, bytes(16)))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "x").write_bytes(
        content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    )
    read_or_refused(tmp_path / "x")


@given(
    st.lists(
        st.tuples(st.sampled_from(["BF16", "F32", "I8"]), st.lists(st.integers(0, 4), max_size=3)),
        max_size=6,
    ),
    st.randoms(),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
def test_what_safetensors_writes_is_always_read(tmp_path, wanted, random):
    kinds = {"BF16": torch.bfloat16, "F32": torch.float32, "I8": torch.int8}
    save_file(
        {
            f"t{index}": torch.zeros(shape, dtype=kinds[dtype])
            for index, (dtype, shape) in enumerate(wanted)
        },
        tmp_path / "x",
    )
    found = read_header(tmp_path / "x")
    assert {(tensor.name, tensor.dtype, tensor.shape) for tensor in found.values()} == {
        (f"t{index}", dtype, tuple(shape)) for index, (dtype, shape) in enumerate(wanted)
    }


# Writing


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture
def source(tmp_path):
    """A source folder, and its bytes: they must not change."""
    path = tmp_path / "source"
    path.mkdir()
    (path / "qtool-manifest.json").write_text("{}")
    before = (path.stat().st_mtime_ns, (path / "qtool-manifest.json").stat().st_mtime_ns)
    yield path
    assert files_below(path) == {"qtool-manifest.json"}
    assert (path.stat().st_mtime_ns, (path / "qtool-manifest.json").stat().st_mtime_ns) == before


@pytest.fixture
def publish(source):
    """A function that writes one file to an output through a staging folder."""

    def publish(
        output: Path, content: str = "new", *, overwrite: bool = False, need_bytes: int = 0
    ) -> None:
        with stage_output(
            output, inputs=[source], overwrite=overwrite, need_bytes=need_bytes
        ) as staging:
            (staging.checkpoint / "qtool-manifest.json").write_text(content)
            (staging.scratch / "left").mkdir()
            (staging.scratch / "left" / "over").write_text("x")
            staging.publish()

    return publish


OLD = '{"files": {"extra": {}}}'


@pytest.fixture
def former(tmp_path):
    """An output that exists already."""
    path = tmp_path / "out"
    path.mkdir()
    (path / "qtool-manifest.json").write_text(OLD)
    (path / "extra").write_text("old")
    return path


def test_the_output_appears_at_once_and_nothing_else_stays(tmp_path, source):
    output = tmp_path / "out"
    with stage_output(output, inputs=[source], overwrite=False, need_bytes=0) as staging:
        (staging.checkpoint / "qtool-manifest.json").write_text("new")
        assert not output.exists()
        assert staging.folder.path.parent == output.parent  # a rename must not cross file systems
        staging.publish()
        assert (output / "qtool-manifest.json").read_text() == "new"
    assert files_below(tmp_path) == {
        "source",
        "source/qtool-manifest.json",
        "out",
        "out/qtool-manifest.json",
    }


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_nothing(tmp_path, source, failure):
    with (
        pytest.raises(failure),
        stage_output(
            tmp_path / "new" / "deep" / "out", inputs=[source], overwrite=False, need_bytes=0
        ) as staging,
    ):
        (staging.checkpoint / "qtool-manifest.json").write_text("new")
        raise failure
    assert files_below(tmp_path) == {"source", "source/qtool-manifest.json"}


def test_missing_parents_are_made(tmp_path, publish):
    publish(tmp_path / "new" / "deep" / "out")
    assert {"new/deep/out/qtool-manifest.json"} <= files_below(tmp_path)
    assert not [name for name in files_below(tmp_path) if name.endswith(".qtool")]


def test_an_output_that_exists_is_refused_and_kept(former, publish, tmp_path):
    with pytest.raises(OutputTaken, match="exists") as caught:
        publish(former)
    assert caught.value.code == "E_OUTPUT_EXISTS"
    assert "--overwrite" in caught.value.hint
    assert (former / "qtool-manifest.json").read_text() == OLD
    assert not list(tmp_path.glob(".*"))


def test_overwrite_keeps_the_former_output_until_the_new_one_is_there(former, source, tmp_path):
    with stage_output(former, inputs=[source], overwrite=True, need_bytes=0) as staging:
        (staging.checkpoint / "qtool-manifest.json").write_text("new")
        assert (former / "qtool-manifest.json").read_text() == OLD
        staging.publish()
        assert (former / "qtool-manifest.json").read_text() == "new"
    assert files_below(former) == {"qtool-manifest.json"}
    assert not list(tmp_path.glob(".*"))


def test_overwrite_that_fails_keeps_the_former_output(former, source, tmp_path):
    with (
        pytest.raises(ValueError),
        stage_output(former, inputs=[source], overwrite=True, need_bytes=0) as staging,
    ):
        (staging.checkpoint / "qtool-manifest.json").write_text("new")
        raise ValueError
    assert (former / "qtool-manifest.json").read_text() == OLD
    assert files_below(former) == {"qtool-manifest.json", "extra"}
    assert not list(tmp_path.glob(".*"))


def test_overwrite_works_where_folders_cannot_be_exchanged_in_one_step(
    former, publish, monkeypatch
):
    # a flag that no kernel knows: EINVAL, as on file systems without it
    monkeypatch.setattr(writer, "_RENAME_EXCHANGE", 1 << 20)
    publish(former, overwrite=True)
    assert files_below(former) == {"qtool-manifest.json"}
    assert (former / "qtool-manifest.json").read_text() == "new"


def test_a_stop_between_the_two_steps_brings_the_former_output_back(former, source, monkeypatch):
    monkeypatch.setattr(writer, "_RENAME_EXCHANGE", 1 << 20)
    rename = os.rename
    with (
        pytest.raises(KeyboardInterrupt),
        stage_output(former, inputs=[source], overwrite=True, need_bytes=0) as staging,
    ):
        (staging.checkpoint / "qtool-manifest.json").write_text("new")

        def stop(name, target, **folders):
            if name == "checkpoint":
                raise KeyboardInterrupt
            return rename(name, target, **folders)

        monkeypatch.setattr(os, "rename", stop)
        staging.publish()
    assert files_below(former) == {"qtool-manifest.json", "extra"}


def test_an_empty_folder_may_be_overwritten_but_not_one_of_other_files(tmp_path, publish):
    (tmp_path / "out").mkdir()
    publish(tmp_path / "out", overwrite=True)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.jpg").write_text("x")
    with pytest.raises(OutputTaken, match="qtool did not write"):
        publish(tmp_path / "photos", overwrite=True)
    assert files_below(tmp_path / "photos") == {"me.jpg"}


def test_an_output_that_appears_meanwhile_is_kept(tmp_path, source):
    output = tmp_path / "out"
    with (
        pytest.raises(OutputTaken, match="meanwhile"),
        stage_output(output, inputs=[source], overwrite=False, need_bytes=0) as staging,
    ):
        output.mkdir()
        (output / "mine").write_text("x")
        staging.publish()
    assert files_below(output) == {"mine"}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["file", "link", "dangling link"])
def test_an_output_that_is_no_folder_is_never_replaced(tmp_path, publish, kind, overwrite):
    output = tmp_path / "out"
    if kind == "file":
        output.write_text("mine")
    else:
        output.symlink_to(tmp_path if kind == "link" else tmp_path / "none")
    with pytest.raises((OutputTaken, UsageError)):
        publish(output, overwrite=overwrite)
    assert output.is_symlink() if kind != "file" else output.read_text() == "mine"


@pytest.mark.parametrize(
    "place", ["source", "source/inside", "source/../source", "link", "link/inside", "."]
)
def test_source_and_output_in_one_another_are_refused(tmp_path, publish, place):
    (tmp_path / "link").symlink_to("source")
    with pytest.raises(UsageError) as caught:
        publish(tmp_path / place, overwrite=True)
    assert caught.value.code == "E_OUTPUT_PLACE"
    assert files_below(tmp_path) == {"source", "source/qtool-manifest.json", "link"}


def test_a_place_that_cannot_be_written_is_refused(tmp_path, publish):
    (tmp_path / "file").write_text("x")
    for output in (tmp_path / "file" / "out", tmp_path / "new" / ("x" * 255)):
        with pytest.raises(ResourceError) as caught:
            publish(output)
        assert (caught.value.code, bool(caught.value.hint)) == ("E_OUTPUT_PLACE", True)
    assert files_below(tmp_path) == {"source", "source/qtool-manifest.json", "file"}


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    tmp_path, publish, monkeypatch
):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12 - 10**9, 10**9))
    publish(tmp_path / "small", need_bytes=10**9)
    with pytest.raises(ResourceError, match=r"1\.50 GB are needed .* 1\.00 GB are free") as caught:
        publish(tmp_path / "new" / "large", need_bytes=1_500_000_000)
    assert (caught.value.code, caught.value.exit_code) == ("E_DISK", 4)
    assert files_below(tmp_path) == {
        "source",
        "source/qtool-manifest.json",
        "small",
        "small/qtool-manifest.json",
    }


HOLDER = """
    import sys, time
    from pathlib import Path
    from qtool.checkpoint import stage_output
    output, source = map(Path, sys.argv[1:3])
    with stage_output(output, inputs=[source], overwrite=True, need_bytes=0) as staging:
        (staging.checkpoint / "qtool-manifest.json").write_text("half")
        (staging.scratch / "layer-7").mkdir()
        if len(sys.argv) > 3:
            output.rename(staging.folder.path / "previous")
        print("held", flush=True)
        time.sleep(60)
"""


@pytest.fixture
def holder(source):
    """A function that starts another process that is writing an output; it is killed at the end."""
    running = []

    def start(output: Path, *arguments: str) -> subprocess.Popen:
        command = [
            sys.executable,
            "-c",
            textwrap.dedent(HOLDER),
            str(output),
            str(source),
            *arguments,
        ]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert running[-1].stdout.readline() == "held\n"
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_second_writer_is_kept_out_and_harms_nothing(tmp_path, publish, holder, monkeypatch):
    monkeypatch.setattr(staging_folder, "LOCK_WAIT_S", 0.3)
    holder(tmp_path / "out")
    before = files_below(tmp_path)
    with pytest.raises(OutputTaken) as caught:
        publish(tmp_path / "out")
    assert (caught.value.code, caught.value.exit_code) == ("E_OUTPUT_IN_USE", 6)
    assert files_below(tmp_path) == before
    publish(tmp_path / "other")  # another output of the same folder is free


def test_a_writer_that_ends_in_time_lets_the_next_one_in(tmp_path, publish, holder):
    first = holder(tmp_path / "out")
    os.kill(first.pid, signal.SIGKILL)
    publish(tmp_path / "out")
    assert (tmp_path / "out" / "qtool-manifest.json").read_text() == "new"


def test_what_a_killed_run_left_is_cleaned_up_by_the_next(tmp_path, publish, holder):
    first = holder(tmp_path / "out")
    first.kill()
    first.wait()
    assert any("layer-7" in name for name in files_below(tmp_path))
    assert not (tmp_path / "out").exists()
    publish(tmp_path / "out")
    assert files_below(tmp_path) == {
        "source",
        "source/qtool-manifest.json",
        "out",
        "out/qtool-manifest.json",
    }


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_a_killed_run_had_put_aside_comes_back(former, publish, holder, overwrite):
    first = holder(former, "put aside")
    first.kill()
    first.wait()
    assert not former.exists()
    if overwrite:
        publish(former, overwrite=True)
        assert (former / "qtool-manifest.json").read_text() == "new"
    else:
        with pytest.raises(OutputTaken):
            publish(former)
        assert files_below(former) == {"qtool-manifest.json", "extra"}


def test_many_writers_of_one_output_take_turns(tmp_path, source):
    code = """
        import json, sys
        from pathlib import Path
        from qtool.checkpoint import stage_output
        output, source, me = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
        for _ in range(20):
            with stage_output(output, inputs=[source], overwrite=True, need_bytes=0) as staging:
                (staging.checkpoint / "qtool-manifest.json").write_text(
                    json.dumps({"files": {"weights": {"me": me}}})
                )
                (staging.checkpoint / "weights").write_text(me)
                assert sorted(path.name for path in staging.checkpoint.iterdir()) == ["qtool-manifest.json", "weights"]
                staging.publish()
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "out"), str(source)]
    writers = [
        subprocess.Popen([*command, str(number)], stderr=subprocess.PIPE, text=True)
        for number in range(3)
    ]
    errors = [process.communicate(timeout=60)[1] for process in writers]
    assert errors == [""] * 3
    manifest = json.loads((tmp_path / "out" / "qtool-manifest.json").read_text())
    assert manifest["files"]["weights"]["me"] == (tmp_path / "out" / "weights").read_text()
    assert files_below(tmp_path) == {
        "source",
        "source/qtool-manifest.json",
        "out",
        "out/qtool-manifest.json",
        "out/weights",
    }


def test_digests_are_sha256_and_size(tmp_path):
    (tmp_path / "b").write_bytes(b"abc")
    (tmp_path / "a").write_bytes(b"")
    assert digest_files([tmp_path / "b", tmp_path / "a"]) == {
        "a": {
            "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
            "size_bytes": 0,
        },
        "b": {
            "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
            "size_bytes": 3,
        },
    }


# The Hub


RESOLVE = """
    import json, sys, time
    from qtool.checkpoint import resolve_model
    from qtool.errors import QtoolError
    start = time.monotonic()
    try:
        answer = {"folder": str(resolve_model(sys.argv[1], **json.loads(sys.argv[2])))}
    except QtoolError as error:
        answer = error.to_dict()
    print(json.dumps({**answer, "seconds": time.monotonic() - start}))
"""


@pytest.fixture
def resolve(tmp_path):
    """A function that resolves a Hub name in a process of its own, with a cache of its own; nothing
    here leaves the machine.
    """

    def resolve(name: str, *, env: dict[str, str], **options) -> dict:
        clean = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith("HF_") and not key.lower().endswith("_proxy")
        }
        environment = {
            **clean,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            **env,
        }
        command = [sys.executable, "-c", textwrap.dedent(RESOLVE), name, json.dumps(options)]
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])

    return resolve


@pytest.fixture
def hub(tiny_model):
    """A real HTTP server that speaks as much of the Hub's API as a download needs; it has the tiny
    model with files that are not wanted.
    """
    files = {
        path.name: path.read_bytes()
        for path in tiny_model.iterdir()
        if path.suffix not in (".py", ".jsonl")
    }
    unwanted = (
        "pytorch_model.bin",
        "modeling_tiny.py",
        "model.gguf",
        "original/consolidated.00.pth",
        "fp32/model.safetensors",
        "onnx/model.onnx",
    )
    files |= dict.fromkeys(unwanted, b"not wanted")
    with HubServer({"org/tiny": files}) as server:
        yield server


def test_a_path_that_exists_or_can_be_no_hub_name_is_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    for name in ("org/model", "./missing", "/no/where", "a/b/c", "with space", "../up"):
        assert resolve_model(name) == Path(name)


def test_a_model_is_downloaded_without_pickles_and_code(resolve, hub, tiny_model):
    answer = resolve("org/tiny", env={"HF_ENDPOINT": hub.url})
    checkpoint = open_checkpoint(Path(answer["folder"]))
    assert (checkpoint.name, checkpoint.hub_name) == ("tiny", "org/tiny")
    assert files_below(checkpoint.path) == {path.name for path in tiny_model.iterdir()} - {
        "corpus.py",
        "train.py",
        "calibration.jsonl",
        "evaluation.jsonl",
    }
    assert (checkpoint.path / "model.safetensors").read_bytes() == (
        tiny_model / "model.safetensors"
    ).read_bytes()
    assert not [
        path
        for path in hub.requested
        if path.endswith((".bin", ".py", ".pth", ".gguf", ".onnx")) or "fp32" in path
    ]


def test_code_is_downloaded_only_when_asked_for(resolve, hub):
    answer = resolve("org/tiny", env={"HF_ENDPOINT": hub.url}, with_code=True)
    assert "modeling_tiny.py" in files_below(Path(answer["folder"]))
    assert "pytorch_model.bin" not in files_below(Path(answer["folder"]))


def test_a_revision_is_taken_and_a_wrong_one_refused(resolve, hub):
    answer = resolve("org/tiny", env={"HF_ENDPOINT": hub.url}, revision="v1.0")
    assert Path(answer["folder"]).name == COMMIT
    assert any("/revision/v1.0" in path for path in hub.requested)
    answer = resolve("org/tiny", env={"HF_ENDPOINT": hub.url}, revision="v9")
    assert answer["code"] == "E_NO_MODEL"
    assert "`v9`" in answer["message"]


def test_a_name_that_the_hub_does_not_know_is_refused(resolve, hub):
    answer = resolve("org/none", env={"HF_ENDPOINT": hub.url})
    assert (answer["code"], answer["exit_code"]) == ("E_NO_MODEL", 3)
    assert "`org/none`" in answer["message"]


def test_a_gated_model_says_how_to_get_access(resolve, hub):
    hub.gated = True
    answer = resolve("org/tiny", env={"HF_ENDPOINT": hub.url})
    assert (answer["code"], answer["exit_code"]) == ("E_HUB_ACCESS", 3)
    assert "hf auth login" in answer["hint"]


def test_a_hub_that_fails_halfway_is_a_download_that_failed(resolve, hub):
    hub.broken = "model.safetensors"
    answer = resolve("org/tiny", env={"HF_ENDPOINT": hub.url})
    assert (answer["code"], answer["exit_code"]) == ("E_DOWNLOAD", 4)
    hub.broken = ""
    # what was complete is kept, the rest fetched
    assert "folder" in resolve("org/tiny", env={"HF_ENDPOINT": hub.url})


def test_a_downloaded_model_is_found_without_a_network(resolve, hub):
    first = resolve("org/tiny", env={"HF_ENDPOINT": hub.url})
    hub.stop()
    for env in ({"HF_ENDPOINT": hub.url}, {"HF_HUB_OFFLINE": "1"}):
        assert resolve("org/tiny", env=env)["folder"] == first["folder"]


def test_no_network_is_said_within_seconds(resolve, hub):
    hub.stop()
    answer = resolve("org/tiny", env={"HF_ENDPOINT": hub.url})
    assert (answer["code"], answer["exit_code"]) == ("E_HUB_UNREACHABLE", 4)
    assert "does not answer" in answer["message"]
    assert answer["seconds"] < 20


def test_a_server_that_never_answers_is_given_up_within_seconds(resolve, hub):
    hub.silent = True
    answer = resolve("org/tiny", env={"HF_ENDPOINT": hub.url})
    assert answer["code"] == "E_HUB_UNREACHABLE"
    assert answer["seconds"] < 20


def test_offline_mode_asks_nobody(resolve, hub):
    answer = resolve("org/tiny", env={"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "1"})
    assert (answer["code"], "HF_HUB_OFFLINE is set" in answer["message"]) == (
        "E_HUB_UNREACHABLE",
        True,
    )
    assert hub.requested == []


@pytest.mark.parametrize(
    "name",
    ["org--x/model", "org/model.git", "-org/model", "org/model-", "a" * 97, "a" * 300, "x..y"],
)
def test_a_name_that_no_repository_can_have_is_refused(resolve, name):
    answer = resolve(name, env={"HF_HUB_OFFLINE": "1"})
    assert (answer["code"], answer["exit_code"]) == ("E_NO_MODEL", 3)


@pytest.mark.parametrize("endpoint", ["http://x:port", "no-scheme", "ftp://x"])
def test_an_endpoint_that_is_none_is_unreachable(resolve, endpoint):
    answer = resolve("org/tiny", env={"HF_ENDPOINT": endpoint})
    assert answer["code"] == "E_HUB_UNREACHABLE"
