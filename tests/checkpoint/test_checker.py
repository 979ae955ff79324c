"""The checker in front of every command: bad folders are refused with code, numbers and hint, in
time and memory; odd ones are taken.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from benchmarks.mutations import run as run_mutations
from support.bad_folders import (
    BAD_FOLDERS,
    GOOD_FILE,
    LAYERS,
    LLAMA,
    entry,
    files,
    index,
    llama,
    llama_tensors,
    quantized,
    safetensors,
    true_file,
)

from qtool import formats
from qtool.checkpoint import open_checkpoint
from qtool.errors import CheckpointRefused

LIMIT_S, LIMIT_MB = 10, 300
CODES = {code for _, code, _ in BAD_FOLDERS.values()}


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    return path


def opened(builder, folder: Path):
    builder(folder)
    checkpoint = open_checkpoint(folder)
    return checkpoint, formats.detect(checkpoint)


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_bad_folder_is_refused_with_code_numbers_and_hint_in_time(folder, case):
    builder, code, says = BAD_FOLDERS[case]
    builder(folder)
    start = time.perf_counter()
    with pytest.raises(CheckpointRefused) as caught:
        formats.detect(open_checkpoint(folder))
    assert time.perf_counter() - start < LIMIT_S
    assert caught.value.code == code, caught.value.message
    assert not [part for part in says if part not in caught.value.message], caught.value.message
    assert caught.value.hint
    assert len(caught.value.message) < 6_000


def test_sixty_kinds_of_damage_have_codes_of_their_own():
    assert len(CODES) >= 60


HEAVY = {  # JSON that is small for what it costs to read
    "empty objects": b'{"a":[' + b"{}," * 745_000 + b"0]}",
    "keys": b'{"a":0' + b"".join(b',"k%06d":0' % number for number in range(749_000)) + b"}",
    "short texts": b'{"a":["xx"' + b',"yy"' * 1_490_000 + b"]}",
    "one wide character": b'{"a":"' + "\N{GRINNING FACE}".encode() + b"x" * (7 << 20) + b'"}',
    "one long text": b'{"a":"' + b"x" * (31 << 20) + b'"}',
    "numbers": b'{"a":[1.5' + b",12345.5" * 1_490_000 + b"]}",
}


def peak_of(folder: Path) -> tuple[float, float, str]:
    """Open ``folder`` in a process of its own; return seconds, peak MB, and the code it was refused
    with.
    """
    code = """
        import re, sys, time
        from pathlib import Path
        from qtool.checkpoint import open_checkpoint
        from qtool.errors import CheckpointRefused
        start, code = time.perf_counter(), ""
        try:
            open_checkpoint(Path(sys.argv[1]))
        except CheckpointRefused as error:
            code = error.code
        seconds, status = time.perf_counter() - start, Path("/proc/self/status").read_text()
        print(seconds, int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) / 1024, code)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(folder)]
    words = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=60
    ).stdout.split()
    return float(words[0]), float(words[1]), words[2] if len(words) > 2 else ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "place"),
    [*((case, "header") for case in HEAVY), *((case, "config") for case in list(HEAVY)[::3])],
)
def test_json_that_costs_much_stays_within_time_and_memory(folder, case, place):
    builder = (
        files(config=HEAVY[case], model__safetensors=GOOD_FILE)
        if place == "config"
        else files(model__safetensors=safetensors(HEAVY[case]))
    )
    builder(folder)
    seconds, megabytes, code = peak_of(folder)
    assert (seconds < LIMIT_S, megabytes < LIMIT_MB) == (True, True), (
        f"{seconds:.1f} s, {megabytes:.0f} MB"
    )
    assert code or place == "config"


@pytest.mark.slow
def test_many_shards_of_long_names_stay_within_time_and_memory(folder):
    files()(folder)
    header = {
        "0." + f"{number}".rjust(200, "x"): entry("U8", [], number, number + 1)
        for number in range(60_000)
    }
    text = json.dumps(header).encode()
    for shard in range(6):  # 30 MB of memory each, beyond MAX_TENSOR_BYTES
        shard_text = text.replace(b'"0.', b'"%d.' % shard)
        (folder / f"{shard:02}.safetensors").write_bytes(safetensors(shard_text, bytes(60_000)))
    seconds, megabytes, code = peak_of(folder)
    assert (seconds < LIMIT_S, megabytes < LIMIT_MB, code) == (True, True, "E_TENSOR_COUNT"), (
        f"{seconds:.1f} s, {megabytes:.0f} MB"
    )


# What safetensors refuses is refused

TENSOR = '"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
REFUSED_BY_SAFETENSORS = {  # header, data
    "NaN in a field": ('{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":NaN}}', b"x"),
    "number out of range in a field": (
        '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":1e999}}',
        b"x",
    ),
    "depth in a field": (
        '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":' + "[" * 200 + "]" * 200 + "}}",
        b"x",
    ),
    "metadata of a number": ('{"__metadata__":{"a":1},' + TENSOR + "}", b"x"),
    "metadata of a list": ('{"__metadata__":[],' + TENSOR + "}", b"x"),
    "metadata of half a character": ('{"__metadata__":{"a":"\\ud800"},' + TENSOR + "}", b"x"),
    "metadata that is a tensor": ('{"__metadata__":' + TENSOR[4:] + "}", b"x"),
    "minus zero": ('{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}', b""),
    "minus zero as offset": ('{"a":{"dtype":"U8","shape":[0],"data_offsets":[-0,0]}}', b""),
    "product beyond 64 bits": (
        '{"a":{"dtype":"U8","shape":[1099511627776,1099511627776,0],"data_offsets":[0,0]}}',
        b"",
    ),
    "half a byte": ('{"a":{"dtype":"F4","shape":[3],"data_offsets":[0,2]}}', b"xx"),
    "quarters of bytes": ('{"a":{"dtype":"F6_E2M3","shape":[3],"data_offsets":[0,3]}}', b"xxx"),
    "byte order mark": ("\ufeff{" + TENSOR + "}", b"x"),
    "zeros behind": ("{" + TENSOR + "}\0\0", b"x"),
    "an empty tensor inside another": (
        '{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[0],"data_offsets":[1,1]}}',
        b"xx",
    ),
}


@pytest.mark.parametrize("case", REFUSED_BY_SAFETENSORS)
def test_what_safetensors_refuses_is_refused(folder, case):
    from safetensors import SafetensorError, deserialize

    header, data = REFUSED_BY_SAFETENSORS[case]
    content = safetensors(header.encode(), data)
    with pytest.raises(SafetensorError):
        deserialize(content)
    files(model__safetensors=content)(folder)
    with pytest.raises(CheckpointRefused):
        open_checkpoint(folder)


# What is unusual and true is taken


@pytest.mark.parametrize("kind", LAYERS)
def test_the_layers_that_are_broken_above_are_good_before(folder, kind):
    _, layout = opened(quantized(kind), folder)
    assert layout and next(iter(layout.modules.values())).shape == (128, 256)


def test_the_model_that_is_broken_above_is_good_before(folder):
    checkpoint, layout = opened(llama(), folder)
    assert layout is None
    assert len(checkpoint.tensors) == len(llama_tensors())


def test_a_folder_of_the_hub_cache_and_links_to_other_disks_are_read(tmp_path, folder):
    blobs = tmp_path / "elsewhere"
    blobs.mkdir()
    files(model__safetensors=GOOD_FILE)(blobs)
    for file in blobs.iterdir():
        (folder / file.name).symlink_to(Path("..") / "elsewhere" / file.name)
    assert set(open_checkpoint(folder).tensors) == {"a.weight", "b.weight"}
    (folder / "model.safetensors").rename(folder / "x.safetensors")
    index({"a.weight": "x.safetensors"})(folder)
    assert open_checkpoint(folder).weight_files == (folder / "x.safetensors",)


MTP = {
    "model__layers__2__eh_proj__weight": (64, 128),
    "model__layers__2__self_attn__q_proj__weight": (7, 7),
}
UNUSUAL = {  # config fields, shapes of tensors
    "padded vocabulary": ({}, {"model__embed_tokens__weight": (128, 64)}),
    "layers that predict further tokens": ({"num_nextn_predict_layers": 1}, MTP),
    "queries with gates": (
        {},
        {f"model__layers__{layer}__self_attn__q_proj__weight": (128, 64) for layer in range(2)},
    ),
    "no head_dim": ({"head_dim": None}, {}),
    "one size for each layer": (
        {"intermediate_size": [96, 128]},
        {"model__layers__1__mlp__gate_proj__weight": (128, 64)},
    ),
    "sliding layers of other heads": (
        {"swa_num_attention_heads": 8},
        {"model__layers__1__self_attn__q_proj__weight": (96, 64)},
    ),
    "layers of other heads": (
        {"num_attention_heads_per_layer": [4, 6]},
        {"model__layers__1__self_attn__q_proj__weight": (96, 64)},
    ),
    "code of its own": ({"auto_map": {"AutoModel": "m.M"}}, {"model__norm__weight": (1, 2)}),
    "encoder and decoder": ({"is_encoder_decoder": True}, {"model__norm__weight": (1, 2)}),
    "draft model": (
        {"architectures": ["LlamaForCausalLMEagle3"]},
        {"model__layers__0__self_attn__q_proj__weight": (64, 128)},
    ),
    "no architecture": ({"architectures": None, "num_hidden_layers": 9}, {}),
    "layers counted twice": ({"num_hidden_layers": 4, "num_layers": 2}, {}),
    "other names": ({"num_hidden_layers": 9}, {"transformer__h__0__weight": (1, 2)}),
}


@pytest.mark.parametrize("case", UNUSUAL)
def test_a_model_that_is_unusual_and_right_is_taken(folder, case):
    config, shapes = UNUSUAL[case]
    if case == "other names":
        files(
            config={**LLAMA, **config},
            model__safetensors=true_file({"transformer.h.0.weight": ("BF16", (1, 2))}),
        )(folder)
    else:
        llama(config, **shapes)(folder)
    open_checkpoint(folder)


@pytest.mark.parametrize(
    "value", [None, True, False, -1, 0, 1.5, float("nan"), "64", [64], {"a": 64}, [], 10**400]
)
@pytest.mark.parametrize(
    "field", [*LLAMA, "text_config", "auto_map", "tie_word_embeddings", "quantization_config"]
)
def test_a_config_field_of_any_type_is_no_crash(folder, field, value):
    llama({field: value})(folder)
    try:
        formats.detect(open_checkpoint(folder))
    except CheckpointRefused as error:
        assert isinstance(value, int | list | str | dict | float) and error.hint


def test_the_config_of_the_language_model_counts(folder):
    config = {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "hidden_size": 1,
        "text_config": LLAMA,
    }
    tensors = {
        name.replace("model.", "model.language_model.", 1): tensor
        for name, tensor in llama_tensors().items()
    }
    files(config=config, model__safetensors=true_file(tensors))(folder)
    open_checkpoint(folder)
    (folder / "config.json").write_text(
        json.dumps({**config, "text_config": {**LLAMA, "hidden_size": 128}})
    )
    with pytest.raises(CheckpointRefused, match=r"model\.language_model\."):
        open_checkpoint(folder)


@pytest.mark.slow
def test_two_thousand_mutations_are_opened_or_refused_and_nothing_else(tmp_path):
    outcome = run_mutations(2_000, tmp_path)
    assert not outcome.wrong
    assert outcome.worst_s < LIMIT_S
    assert outcome.codes["opened"] > 100
    assert len(outcome.codes) > 25
