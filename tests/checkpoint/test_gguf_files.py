"""GGUF files: what is read from their headers, and that nothing in them can do harm."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import EXAMPLE
from support.gguf_bytes import DAMAGE, Gguf, array, f32, string, u16, u32
from support.gguf_files import write_gguf
from tokenizers import Regex, Tokenizer, pre_tokenizers

from qtool.checkpoint import open_checkpoint, source_files
from qtool.checkpoint.gguf_header import read_gguf
from qtool.checkpoint.gguf_rope import llama3_factors
from qtool.checkpoint.gguf_tokenizer import PRE_TOKENIZERS
from qtool.errors import CheckpointRefused, QtoolError, ResourceError
from qtool.inspection import inspect

PEAK_BYTES = 32 << 20


def test_a_file_is_a_checkpoint_with_the_names_of_transformers(tmp_path):
    checkpoint = open_checkpoint(Gguf().write(tmp_path / "tiny.gguf"))
    assert checkpoint.name == "tiny"
    assert checkpoint.config["architectures"] == ["LlamaForCausalLM"]
    assert checkpoint.config["rms_norm_eps"] == 1e-5
    assert checkpoint.config["vocab_size"] == 32
    assert checkpoint.tied_embeddings
    assert checkpoint.tensors["model.layers.0.self_attn.q_proj.weight"].shape == (32, 32)
    assert len(checkpoint.tensors) == 11
    assert checkpoint.weight_files == (tmp_path / "tiny.gguf",)


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused_by_name_and_takes_no_memory(tmp_path, name):
    change, code = DAMAGE[name]
    file = Gguf()
    change(file)
    path = file.write(tmp_path / "model.gguf")
    tracemalloc.start()
    with pytest.raises(CheckpointRefused) as error:
        open_checkpoint(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert error.value.code.startswith(code), error.value.message
    assert error.value.hint
    assert peak < PEAK_BYTES


@pytest.mark.slow
@pytest.mark.parametrize("name", ["2^63 tensors", "an offset outside"])
def test_the_command_ends_with_exit_code_3(tmp_path, run_cli, name):
    change, code = DAMAGE[name]
    file = Gguf()
    change(file)
    file.write(tmp_path / "model.gguf")
    for command in (["inspect"], ["export", "--to", "bf16", "--output", "out"]):
        result = run_cli(*command, "--model-path", "model.gguf")
        assert result.exit_code == 3, result.stderr
        assert code in result.stderr


def test_every_truncation_is_refused(tmp_path):
    whole = Gguf().write(tmp_path / "model.gguf").read_bytes()
    header = len(whole) - Gguf().data_bytes
    for size in [*range(0, header, 7), header, len(whole) - 1]:
        (tmp_path / "model.gguf").write_bytes(whole[:size])
        with pytest.raises(CheckpointRefused):
            read_gguf(tmp_path / "model.gguf")


@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    changes=st.lists(
        st.tuples(
            st.integers(0, 1100),
            st.sampled_from([0, 1, 7, 0x7F, 0x80, 0xFF]) | st.integers(0, 255),
            st.integers(1, 8),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_changed_bytes_are_refused_or_read(tmp_path, changes):
    data = bytearray(Gguf().write(tmp_path / "whole.gguf").read_bytes())
    for place, value, count in changes:
        data[place : place + count] = bytes([value]) * count
    (tmp_path / "model.gguf").write_bytes(data)
    tracemalloc.start()
    try:
        open_checkpoint(tmp_path / "model.gguf")
    except QtoolError as error:
        assert isinstance(error, CheckpointRefused)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < PEAK_BYTES


def _split(folder: Path, *, numbers: tuple[int, int] = (0, 1), count: int = 2) -> Path:
    """Write two files of one model, which say that they are ``numbers`` of ``count``."""
    whole = Gguf()
    cut = 4
    first_bytes = whole.tensors[cut][3]
    parts = (
        Gguf(tensors=whole.tensors[:cut], data_bytes=first_bytes),
        Gguf(
            metadata={},
            tensors=[
                (name, dims, kind, at - first_bytes) for name, dims, kind, at in whole.tensors[cut:]
            ],
            data_bytes=whole.data_bytes - first_bytes,
        ),
    )
    for part, number in zip(parts, numbers, strict=True):
        part.metadata |= {"split.no": u16(number), "split.count": u16(count)}
    paths = [folder / f"model-0000{number}-of-00002.gguf" for number in (1, 2)]
    for part, path in zip(parts, paths, strict=True):
        part.write(path)
    return paths[0]


def test_a_split_model_is_read_whole_from_either_file_or_the_folder(tmp_path):
    first = _split(tmp_path)
    for path in (first, first.with_name("model-00002-of-00002.gguf"), tmp_path):
        checkpoint = open_checkpoint(path)
        assert checkpoint.name == "model"
        assert len(checkpoint.tensors) == 11
        assert len(checkpoint.weight_files) == 2


@pytest.mark.parametrize(
    ("numbers", "count"), [((0, 0), 2), ((1, 0), 2), ((0, 1), 3), ((0, 1), 65535)]
)
def test_files_that_are_not_the_parts_of_one_model_are_refused(tmp_path, numbers, count):
    with pytest.raises(CheckpointRefused) as error:
        open_checkpoint(_split(tmp_path, numbers=numbers, count=count))
    assert error.value.code == "E_GGUF_SPLIT"


def test_a_part_that_is_missing_or_links_in_a_circle_is_refused(tmp_path):
    first = _split(tmp_path)
    second = first.with_name("model-00002-of-00002.gguf")
    second.unlink()
    with pytest.raises(CheckpointRefused, match="is missing"):
        open_checkpoint(first)
    second.symlink_to(first)  # the first again
    with pytest.raises(CheckpointRefused, match="part 2 of 2"):
        open_checkpoint(first)
    second.unlink()
    second.symlink_to(second)
    with pytest.raises(CheckpointRefused):
        open_checkpoint(first)
    Gguf().write(tmp_path / "other-00001-of-99999.gguf")
    with pytest.raises(CheckpointRefused, match="99,999 files"):
        open_checkpoint(tmp_path / "other-00001-of-99999.gguf")
    Gguf().write(tmp_path / "model-00003-of-00002.gguf")
    with pytest.raises(CheckpointRefused, match="part 3 of 2"):
        open_checkpoint(tmp_path / "model-00003-of-00002.gguf")


def test_a_folder_with_several_models_asks_for_one(tmp_path):
    for name in ("model-Q4_0.gguf", "model-Q8_0.gguf"):
        Gguf().write(tmp_path / name)
    with pytest.raises(CheckpointRefused) as error:
        open_checkpoint(tmp_path)
    assert error.value.code == "E_GGUF_SEVERAL"
    assert "--model-path" in error.value.hint


def test_a_folder_with_safetensors_too_says_what_is_read(tmp_path):
    shutil.copytree(EXAMPLE, tmp_path / "model")
    for name in ("a.gguf", "b.gguf"):
        Gguf().write(tmp_path / "model" / name)
    checkpoint = open_checkpoint(tmp_path / "model")
    assert checkpoint.gguf_file is None
    for notes in (inspect(checkpoint).warnings, source_files(checkpoint).notes):
        assert any(
            "the safetensors files are read, not a.gguf and 1 more" in note for note in notes
        )


def test_settings_for_sampling_that_are_not_used_are_said(tmp_path):
    file = Gguf()
    for name in ("temp", "xtc_threshold", "penalty_last_n"):
        file.metadata[f"general.sampling.{name}"] = f32(0.5)
    (note,) = open_checkpoint(file.write(tmp_path / "model.gguf")).notes
    assert note.endswith("general.sampling.penalty_last_n, general.sampling.xtc_threshold")


@pytest.mark.parametrize("name", [b"sha256-abc", b"not UTF-8 \xff.gguf"], ids=["start", "bytes"])
def test_a_file_under_another_name_is_read(tmp_path, name):
    """Ollama's names have no ending: files are known by their start."""
    path = Gguf().write(tmp_path / os.fsdecode(name))
    assert len(open_checkpoint(path).tensors) == 11


OPEN = """
import sys
from pathlib import Path
from qtool.checkpoint import open_checkpoint, source_files
print(open_checkpoint(Path(sys.argv[1])).path, flush=True)
if input() == "hand over":
    from qtool.serve.engine_command import Command
    from qtool.serve.handover import hand_over
    hand_over(Command("vllm", ("/bin/true",)))
"""


@pytest.fixture
def opener(tmp_path):
    """A function that starts a process which opens a GGUF file; and the folder it derives."""
    file = Gguf().write(tmp_path / "model.gguf")
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with contextlib.ExitStack() as stack:

        def start() -> tuple[subprocess.Popen[str], Path]:
            process = subprocess.Popen(
                [sys.executable, "-c", OPEN, str(file)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            assert process.stdout is not None
            return process, Path(process.stdout.readline().strip())

        yield start


@pytest.mark.parametrize("order", ["end", "hand over"])
def test_what_is_derived_from_a_file_goes_with_its_process(opener, order):
    process, folder = opener()
    assert {path.name for path in folder.iterdir()} == {"config.json", "generation_config.json"}
    process.communicate(f"{order}\n")
    assert process.returncode == 0
    assert not folder.exists()


def test_what_a_killed_process_has_derived_is_removed_by_the_next(opener):
    _lives, second = opener()
    killed, third = opener()
    killed.kill()
    killed.wait()
    strange = third.with_name(".qtool-gguf-mine")  # not of a name that qtool gives
    strange.mkdir(mode=0o700)
    for folder in (second, third, strange):
        os.utime(folder, (0, 0))
    opener()  # removes what nobody uses
    assert second.is_dir()
    assert not third.exists()
    assert strange.is_dir()


def test_a_derived_folder_that_was_removed_is_made_again(tmp_path):
    file = Gguf().write(tmp_path / "model.gguf")
    folder = open_checkpoint(file).path
    assert open_checkpoint(file).path == folder
    shutil.rmtree(folder)
    assert (open_checkpoint(file).path / "config.json").is_file()


def test_no_room_for_what_is_derived_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(ResourceError) as error:
        open_checkpoint(Gguf().write(tmp_path / "model.gguf"))
    assert error.value.code == "E_TEMPORARY"


def test_llama_3s_frequencies_become_its_scaling_again(tmp_path):
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    factors = {"rope_freqs.weight": llama3_factors(scaling, 10_000.0, 64)}
    write_gguf(EXAMPLE, tmp_path / "model.gguf", "F16", vectors=factors)
    assert open_checkpoint(tmp_path / "model.gguf").config["rope_scaling"] == scaling


def test_the_tokenizer_and_what_belongs_to_it_come_from_the_file(tmp_path):
    write_gguf(EXAMPLE, tmp_path / "model.gguf", "F16")
    folder = open_checkpoint(tmp_path / "model.gguf").path
    ours = Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs = Tokenizer.from_file(str(EXAMPLE / "tokenizer.json"))
    text = (EXAMPLE / "train.py").read_text() + "<|im_start|>user\nGrüße, 123 \t 語<|im_end|>"
    assert ours.encode(text).ids == theirs.encode(text).ids
    assert ours.decode(ours.encode(text).ids) == theirs.decode(theirs.encode(text).ids)
    template = (folder / "chat_template.jinja").read_text()
    assert template == (EXAMPLE / "chat_template.jinja").read_text()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["eos_token"] == "<|endoftext|>"
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [0, 2]


@pytest.mark.parametrize(
    ("name", "cut"),
    [
        ("llama-bpe", ["Hello", " World", "'s", " ", "123", "45", " x", "!=\n", " é中"]),
        ("qwen2", ["Hello", " World", "'s", " ", *"12345", " x", "!=\n", " é中"]),
        ("tekken", ["Hello", " World", "'s", " ", *"12345", " x", "!=\n", " é中"]),
        ("gpt-4o", ["Hello", " World's", " ", "123", "45", " x", "!=\n", " é中"]),
    ],
)
def test_text_is_cut_as_the_file_names_it(name, cut):
    split = pre_tokenizers.Split(Regex(PRE_TOKENIZERS[name].pattern), "isolated")
    assert [part for part, _ in split.pre_tokenize_str("Hello World's 12345 x!=\n é中")] == cut


def test_a_sentencepiece_vocabulary_becomes_merges_by_score(tmp_path):
    pieces = ["<unk>", "<s>", "</s>", "<0x21>", "▁", "a", "b", "ab", "▁a", "▁ab"]
    scores = [0.0, 0.0, 0.0, 0.0, -9.0, -8.0, -7.0, -1.0, -2.0, -3.0]
    types = [2, 3, 3, 6, 1, 1, 1, 1, 1, 1]
    file = Gguf()
    file.metadata |= {
        "tokenizer.ggml.model": string("llama"),
        "tokenizer.ggml.tokens": array(8, 10, b"".join(string(piece)[4:] for piece in pieces)),
        "tokenizer.ggml.scores": array(6, 10, b"".join(f32(score)[4:] for score in scores)),
        "tokenizer.ggml.token_type": array(4, 10, b"".join(u32(kind)[4:] for kind in types)),
        "tokenizer.ggml.bos_token_id": u32(1),
        "tokenizer.ggml.unknown_token_id": u32(0),
    }
    folder = open_checkpoint(file.write(tmp_path / "model.gguf")).path
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode("ab a!").tokens == ["<s>", "▁ab", "▁a", "<0x21>"]
    assert tokenizer.decode(tokenizer.encode("ab a!").ids) == "ab a!"
