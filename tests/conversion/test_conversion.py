"""Conversion between formats: codes and scales go through untouched or not at all, and what is
written is the model that was read.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import resource
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import EXAMPLE
from support.samples import PROMPT_TOKENS, token_sequences
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Mxfp4Config,
)

from qtool.checkpoint import open_checkpoint
from qtool.checkpoint.shards import Shards
from qtool.conversion import TARGETS, export
from qtool.conversion.targets import UNQUANTIZED
from qtool.errors import CheckpointRefused, OutputTaken, ResourceError, UsageError
from qtool.evaluation.perplexity import load_dequantized
from qtool.events import ProgressEvent
from qtool.formats import WRITABLE, QuantizedModule, detect, read, tensor_name
from qtool.formats.packing import read_tensor
from qtool.inspection.comparison import compare
from qtool.scheme import SCHEMES, Activations, Scheme, Weights
from qtool.weight import dequantize, quantize

pytestmark = pytest.mark.usefixtures("one_thread")
pytest_plugins = ["support.sample_plugin"]

CT, MODELOPT, AWQ, GPTQ, GPTQ_V2, FP8, MXFP4 = (
    "compressed-tensors",
    "modelopt",
    "awq",
    "gptq",
    "gptq_v2",
    "fp8_block",
    "mxfp4",
)
TABLE = {  # the formats that hold a sample as it is; all others must refuse it
    (CT, MODELOPT, AWQ, GPTQ, GPTQ_V2): "ct/W4A16 gptq/rtn4 gptq/rtn_gemm modelopt/INT4",
    (CT, AWQ, GPTQ, GPTQ_V2): "ct/W4A16_ASYM gptq/asym_v1 gptq/asym_v2",
    (CT, MODELOPT, GPTQ, GPTQ_V2): "modelopt/INT8_WO",
    (
        CT,
        GPTQ,
        GPTQ_V2,
    ): "ct/W2A16 ct/W3A16 ct/W8A16 gptq/channel2 gptq/desc_act gptq/dynamic gptq/gptq3",
    (CT, MODELOPT, FP8): "ct/FP8 ct/FP8_BLOCK modelopt/FP8 modelopt/FP8_KV",
    (
        CT,
        MODELOPT,
    ): """ct/FP8_DYNAMIC ct/kv_fp8 modelopt/FP8_PC_PT modelopt/FP8_PB_WO ct/NVFP4 ct/NVFP4A16 modelopt/NVFP4 modelopt/W4A16_NVFP4
        ct/MXFP4 ct/MXFP8 modelopt/MXFP4 modelopt/MXFP8 ct/mixed modelopt/MIXED modelopt/INT8""",
    (CT,): """ct/W5A16 ct/W5A16_ASYM ct/W6A16 ct/W7A16 ct/W4A8 ct/W4AFP8 ct/W8A8 ct/W8A8_STATIC_ASYM
        ct/fp8_weight_only ct/MXFP4A16 ct/MXFP8A16""",
    (MODELOPT,): (
        "modelopt/INT4_AWQ modelopt/INT8_SQ modelopt/W4A8_AWQ modelopt/W4A8_MXFP4_FP8 "
        "modelopt/W4A8_NVFP4_FP8"
    ),
}
HELD = {name: targets for targets, names in TABLE.items() for name in names.split()}
IN_PIECES = ("ct/NVFP4", "gptq/desc_act", "modelopt/FP8_KV")  # in files of 1 MiB


def content(checkpoint):
    return {
        name: (tensor.dtype, tensor.shape, tensor.read())
        for name, tensor in checkpoint.tensors.items()
    }


def schemes(layout):
    return {name: module.scheme for name, module in layout.modules.items()}


def home(layout):
    """The target that writes the format, and the version of it, that ``layout`` has."""
    return next(iter(layout.modules.values())).variant if layout.format == GPTQ else layout.format


def refusal(source, tmp_path, to, **options):
    """What ``export`` says when it refuses; nothing may be left of it."""
    before = set(tmp_path.iterdir())
    with pytest.raises(CheckpointRefused) as caught:
        export(source, to=to, output=tmp_path / "refused" / "out", **options)
    assert set(tmp_path.iterdir()) == before
    assert (caught.value.code, caught.value.exit_code) == ("E_CANNOT_HOLD", 3)
    assert f"{to} cannot hold this checkpoint" in caught.value.message
    return caught.value


def write_layers(
    folder: Path,
    layers: Mapping[str, tuple[torch.Tensor, Scheme]],
    *,
    to=CT,
    plain: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Write a checkpoint in the format ``to`` of some linear layers, each rounded to nearest in its
    scheme.
    """
    folder.mkdir(parents=True)
    rounded = {layer: quantize(*layer) for layer in set(layers.values())}
    modules, tensors = [], dict(plain or {})
    for name, layer in layers.items():
        modules.append(
            QuantizedModule(
                name, layer[1], rounded[layer].shape, {}, to if to.startswith(GPTQ) else ""
            )
        )
        tensors |= {
            tensor_name(modules[-1], suffix): part.clone()
            for suffix, part in WRITABLE[to].write(modules[-1], rounded[layer]).items()
        }
    left = [
        name.removesuffix(".weight") for name, tensor in (plain or {}).items() if tensor.dim() == 2
    ]
    for name, values in WRITABLE[to].quantization_config(modules, left, None).items():
        (folder / name).write_text(
            json.dumps({"model_type": "llama", **values} if name == "config.json" else values)
        )
    save_file(tensors, folder / "model.safetensors")
    return folder


def edit(folder: Path, tensors=lambda tensors: None, config=lambda config: None) -> Path:
    """Change the tensors and the config of a checkpoint of one file."""
    loaded = load_file(folder / "model.safetensors")
    tensors(loaded)
    save_file(loaded, folder / "model.safetensors")
    whole = json.loads((folder / "config.json").read_text())
    config(whole)
    (folder / "config.json").write_text(json.dumps(whole))
    return folder


def random_weight(rows=64, columns=256, seed=0, dtype=torch.bfloat16):
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) / 20).to(
        dtype
    )


@torch.inference_mode()
def logits(model):
    return model(
        torch.tensor(token_sequences("evaluation.jsonl", 1, PROMPT_TOKENS)), use_cache=False
    ).logits.float()


def plain_transformers(folder, **options):
    return AutoModelForCausalLM.from_pretrained(
        folder, **{"dtype": torch.bfloat16, **options}
    ).eval()


@pytest.fixture
def copy(sample, tmp_path):
    """A function: the name of a sample to a copy of it that a test may break."""
    return lambda name: Path(shutil.copytree(sample(name), tmp_path / "copy"))


# Every sample in every format


@pytest.mark.parametrize("name", HELD)
def test_a_sample_goes_to_every_format_that_holds_it_and_back_to_the_same_bytes(
    sample, tmp_path, name
):
    source = open_checkpoint(sample(name))
    layout, size = detect(source), "1MiB" if name in IN_PIECES else "5GB"
    for to in set(HELD[name]) - {home(layout)} or HELD[name]:
        there = export(source.path, to=to, output=tmp_path / to, max_shard_size=size)
        again = export(
            there.output, to=home(layout), output=tmp_path / f"{to}-back", max_shard_size=size
        )
        assert (there.rounded_layers, again.rounded_layers, again.files > 1) == (
            0,
            0,
            name in IN_PIECES,
        )
        between, result = detect(open_checkpoint(there.output)), open_checkpoint(again.output)
        assert content(result) == content(source)
        assert schemes(between) == schemes(detect(result)) == schemes(layout)
        assert between.kv_cache == detect(result).kv_cache == layout.kv_cache
        assert (between.warnings, detect(result).warnings) == ((), ())


@pytest.mark.parametrize("name", HELD)
def test_every_other_format_refuses_a_sample(sample, tmp_path, name):
    for to in TARGETS:
        if to not in (*HELD[name], *UNQUANTIZED):
            refusal(sample(name), tmp_path, to)


def test_every_sample_stands_in_the_table(sample):
    folders = [
        path
        for library in ("ct", "gptq", "modelopt")
        for path in (sample(library)).iterdir()
        if (path / "config.json").exists()
    ]
    assert {f"{path.parent.name}/{path.name}" for path in folders} - {"gptq/short-model"} == set(
        HELD
    )


@pytest.mark.parametrize(
    ("name", "to"),
    [
        ("ct/NVFP4", MODELOPT),
        ("ct/FP8_BLOCK", FP8),
        ("ct/W4A16_ASYM", AWQ),
        ("gptq/desc_act", CT),
        ("gptq/rtn4", MODELOPT),
        ("modelopt/FP8_KV", FP8),
        ("modelopt/MIXED", CT),
        ("modelopt/INT8_SQ", MODELOPT),
    ],
)
def test_a_converted_model_computes_exactly_the_same_logits(sample, tmp_path, name, to):
    export(sample(name), to=to, output=tmp_path / "out")
    assert torch.equal(
        logits(load_dequantized(open_checkpoint(tmp_path / "out"))),
        logits(load_dequantized(open_checkpoint(sample(name)))),
    )


@pytest.mark.parametrize(
    "name",
    [
        "ct/W3A16",
        "ct/MXFP8A16",
        "gptq/asym_v1",
        "gptq/desc_act",
        "modelopt/INT8_WO",
        "modelopt/W4A16_NVFP4",
    ],
)
def test_plain_transformers_computes_the_same_logits_from_what_was_dequantized(
    sample, tmp_path, name
):
    result = export(sample(name), to="bf16", output=tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (
        config["dtype"],
        "quantization_config" in config,
        detect(open_checkpoint(result.output)),
    ) == ("bfloat16", False, None)
    assert torch.equal(
        logits(plain_transformers(tmp_path / "out")),
        logits(load_dequantized(open_checkpoint(sample(name)))),
    )


def test_the_factor_of_an_input_is_multiplied_into_the_dequantized_weight(sample, tmp_path):
    export(sample("modelopt/INT4_AWQ"), to="bf16", output=tmp_path / "out")
    checkpoint = open_checkpoint(sample("modelopt/INT4_AWQ"))
    weight = read(checkpoint, detect(checkpoint), "model.layers.0.mlp.down_proj")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(
        found["model.layers.0.mlp.down_proj.weight"],
        (dequantize(weight) * weight.pre_scale.float()).bfloat16(),
    )
    assert not [name for name in found if name.endswith("pre_quant_scale")]
    off = logits(plain_transformers(tmp_path / "out")) - logits(load_dequantized(checkpoint))
    assert off.abs().mean() < 0.02


def test_to_f16_every_16_bit_tensor_is_cast(sample, tmp_path):
    export(sample("ct/mixed"), to="fp16", output=tmp_path / "out")
    assert {tensor.dtype for tensor in open_checkpoint(tmp_path / "out").tensors.values()} == {
        "F16"
    }
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"
    before = load_file(sample("ct/mixed") / "model.safetensors")
    assert torch.equal(
        load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"],
        before["model.norm.weight"].half(),
    )


@pytest.mark.parametrize(
    ("name", "to"),
    [
        ("gptq/desc_act", GPTQ_V2),
        ("gptq/desc_act", "bf16"),
        ("gptq/asym_v1", CT),
        ("ct/NVFP4", MODELOPT),
        ("ct/kv_fp8", MODELOPT),
        ("ct/W8A8_STATIC_ASYM", CT),
        ("modelopt/FP8_KV", FP8),
        ("modelopt/INT8_SQ", "f16"),
    ],
)
def test_no_tensor_is_read_twice(sample, tmp_path, monkeypatch, name, to):
    reads = Counter()

    def count_reads(checkpoint, tensor):
        reads[tensor] += 1
        return read_tensor(checkpoint, tensor)

    def count_copies(shards, tensor, source):
        reads[source.name] += 1
        return copy(shards, tensor, source)

    copy = Shards.copy
    monkeypatch.setattr(Shards, "copy", count_copies)
    for module in ("layers", "streaming"):
        monkeypatch.setattr(f"qtool.conversion.{module}.read_tensor", count_reads)
    export(sample(name), to=to, output=tmp_path / "out")
    assert reads.keys() <= open_checkpoint(sample(name)).tensors.keys()
    assert max(reads.values()) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("home", [CT, AWQ, GPTQ])
def test_scales_keep_their_dtype_through_every_format(tmp_path, dtype, home):
    layers = {"model.layers.0.self_attn.q_proj": (random_weight(dtype=dtype), SCHEMES["W4A16"])}
    source = write_layers(
        tmp_path / "source",
        layers,
        to=home,
        plain={"model.norm.weight": torch.ones(256, dtype=dtype)},
    )
    for to in (CT, MODELOPT, AWQ, GPTQ, GPTQ_V2):
        export(source, to=to, output=tmp_path / to)
        export(tmp_path / to, to=home, output=tmp_path / f"{to}-back")
        assert content(open_checkpoint(tmp_path / f"{to}-back")) == content(open_checkpoint(source))


def test_the_scales_of_the_kv_cache_take_the_names_of_the_format(sample, tmp_path):
    names = {}
    for to in (CT, MODELOPT, FP8):
        export(sample("modelopt/FP8_KV"), to=to, output=tmp_path / to)
        tensors = open_checkpoint(tmp_path / to).tensors
        names[to] = {
            name.partition("self_attn.")[2]: tensor.shape
            for name, tensor in tensors.items()
            if re.search("layers.0.*[kv]_scale", name)
        }
    assert names[CT] == {"k_scale": (1,), "v_scale": (1,)}
    assert names[MODELOPT] == {"k_proj.k_scale": (), "v_proj.v_scale": ()}
    assert names[FP8] == {"k_scale": (), "v_scale": ()}


def test_layers_that_engines_fuse_keep_the_second_scale_they_share(sample, tmp_path):
    """Source: TensorRT-LLM, `_torch/modules/linear.py`,
    W4A8_AWQ_LinearMethod.load_weight_scales_w4a8, which asserts it.
    """
    export(sample("modelopt/W4A8_AWQ"), to=MODELOPT, output=tmp_path / "out")
    for folder in (sample("modelopt/W4A8_AWQ"), tmp_path / "out"):
        tensors = load_file(folder / "model.safetensors")
        for fused in (("self_attn.q", "self_attn.k", "self_attn.v"), ("mlp.gate", "mlp.up")):
            assert (
                len(
                    {float(tensors[f"model.layers.0.{kind}_proj.weight_scale_2"]) for kind in fused}
                )
                == 1
            )


def test_a_checkpoint_of_which_only_the_cache_is_quantized_is_converted_or_refused(copy, tmp_path):
    def dequantize_all(tensors):
        for name in [name for name in tensors if name.endswith("weight_scale")]:
            del tensors[name]
            tensors[name.removesuffix("_scale")] = tensors[name.removesuffix("_scale")].bfloat16()

    source = edit(
        copy("ct/kv_fp8"),
        dequantize_all,
        lambda config: config["quantization_config"].update(config_groups={}),
    )
    assert detect(open_checkpoint(source)).modules == {}
    assert export(source, to=MODELOPT, output=tmp_path / MODELOPT).layers == 0
    refusal(source, tmp_path, FP8)


# What cannot be held


@pytest.mark.parametrize(
    ("name", "to", "constraint"),
    [
        ("gptq/desc_act", AWQ, "act-order: groups are scattered over the inputs (g_idx)"),
        ("gptq/desc_act", MODELOPT, "act-order"),
        ("modelopt/INT4_AWQ", GPTQ, "pre_quant_scale: the input is multiplied by a stored factor"),
        ("modelopt/INT8_SQ", CT, "pre_quant_scale"),
        ("ct/W4A16_ASYM", MODELOPT, "no algorithm for W4A16_ASYM"),
        ("ct/W8A16", AWQ, "bits: the weights are int8, and AWQ holds int4"),
        (
            "ct/W5A16",
            GPTQ,
            "format: the weights are int5, and GPTQ holds integers of 2, 3, 4, 8 bits",
        ),
        ("ct/NVFP4", FP8, "format: the weights are nvfp4 g16, and this format holds fp8"),
        ("ct/FP8_DYNAMIC", FP8, "granularity: one scale for each channel"),
        (
            "ct/W4A8",
            GPTQ,
            "activations: inputs are rounded to int8 token, and GPTQ leaves them in 16 bits",
        ),
        (
            "modelopt/FP8_PB_WO",
            FP8,
            "activations: inputs are left in 16 bits, and engines round them to fp8 g128",
        ),
        ("modelopt/W4A8_MXFP4_FP8", CT, "activations: mxfp4 weights go with mxfp4 inputs"),
        (
            "modelopt/W4A8_NVFP4_FP8",
            CT,
            "group_size: fp4 with e4m3 scales comes in groups of 16 here, found 32",
        ),
        ("ct/MXFP4A16", MXFP4, "experts: this format holds the stacked experts of gpt-oss"),
    ],
)
def test_a_refusal_names_the_constraint_and_the_layer(sample, tmp_path, name, to, constraint):
    error = refusal(sample(name), tmp_path, to)
    assert constraint in error.message
    assert "`model.layers.0." in error.message
    assert "--requantize" in error.hint


def test_scales_of_the_kv_cache_that_have_no_place_are_refused_and_left_out_only_when_asked(
    copy, tmp_path
):
    def add_cache(tensors):
        tensors |= {
            f"model.layers.{layer}.self_attn.{which}_scale": torch.tensor([0.5])
            for layer in range(6)
            for which in "kv"
        }

    fp8 = {
        "num_bits": 8,
        "type": "float",
        "strategy": "tensor",
        "dynamic": False,
        "symmetric": True,
    }
    source = edit(
        copy("ct/W4A16"),
        add_cache,
        lambda config: config["quantization_config"].update(kv_cache_scheme=fp8),
    )
    error = refusal(source, tmp_path, AWQ)
    assert "kv-cache: there is no place for the 1 scale(s) of the KV cache" in error.message
    result = export(source, to=AWQ, output=tmp_path / "out", requantize=True)
    assert (result.rounded_layers, detect(open_checkpoint(result.output)).kv_cache) == (0, None)
    assert result.notes == (
        "12 scales of the KV cache are left out: there is no place for them in awq",
    )
    kept = export(source, to=MODELOPT, output=tmp_path / "kept")
    assert (kept.notes, detect(open_checkpoint(kept.output)).kv_cache) == ((), "fp8")


def test_a_scale_for_each_head_of_the_kv_cache_stays_in_compressed_tensors(copy, tmp_path):
    def add_heads(tensors):
        tensors.update(
            {
                name: tensor.expand(2).reshape(2, 1, 1).clone()
                for name, tensor in tensors.items()
                if re.search("[kv]_scale", name)
            }
        )

    source = edit(
        copy("ct/kv_fp8"),
        add_heads,
        lambda config: config["quantization_config"]["kv_cache_scheme"].update(
            strategy="attn_head"
        ),
    )
    assert "the 2 scale(s) of the KV cache" in refusal(source, tmp_path, MODELOPT).message
    kept = open_checkpoint(export(source, to=CT, output=tmp_path / "kept").output)
    assert kept.quantization_config["kv_cache_scheme"]["strategy"] == "attn_head"
    assert content(kept) == content(open_checkpoint(source))


def test_layers_in_unlike_groups_have_no_config_in_formats_with_one_group_size(tmp_path):
    sizes = {"model.layers.0.mlp.up_proj": 32, "model.layers.0.mlp.down_proj": 64}
    layers = {
        name: (random_weight(), SCHEMES["W4A16"].with_group_size(size))
        for name, size in sizes.items()
    }
    source = write_layers(tmp_path / "source", layers)
    for to in (AWQ, MODELOPT):
        with pytest.raises(CheckpointRefused, match=r"group_size: .* has one for") as caught:
            export(source, to=to, output=tmp_path / "out")
        assert caught.value.code == "E_CANNOT_HOLD"
    export(source, to=GPTQ, output=tmp_path / "out")
    assert schemes(detect(open_checkpoint(tmp_path / "out"))) == {
        name: scheme for name, (_, scheme) in layers.items()
    }


def test_two_schemes_do_not_fit_into_a_format_that_knows_one(tmp_path):
    layers = {"model.layers.0.mlp.up_proj": (random_weight(), SCHEMES["FP8_BLOCK"])}
    inputs = Activations("fp8", "group", 64)
    layers["model.layers.0.mlp.down_proj"] = (
        random_weight(),
        Scheme(Weights("fp8", "block", block=(64, 64)), inputs),
    )
    with pytest.raises(CheckpointRefused, match="scheme: one for all layers") as caught:
        export(write_layers(tmp_path / "source", layers), to=FP8, output=tmp_path / "out")
    assert caught.value.code == "E_CANNOT_HOLD"


def test_a_name_that_engines_would_find_inside_a_quantized_one_is_refused(tmp_path):
    layers = {"model.layers.1.mlp.gate_proj": (random_weight(), SCHEMES["W4A16"])}
    source = write_layers(
        tmp_path / "source", layers, plain={"model.layers.1.mlp.gate.weight": random_weight()}
    )
    with pytest.raises(CheckpointRefused, match=r"would skip `model\.layers\.1\.mlp\.gate_proj`"):
        export(source, to=AWQ, output=tmp_path / "out")
    assert export(source, to=GPTQ, output=tmp_path / "out").layers == 1


def test_online_rotations_are_refused_by_every_format(copy, tmp_path):
    transform = {
        "config_groups": {
            "R3": {"type": "hadamard", "apply": [{"targets": ["re:.*q_proj"], "location": "input"}]}
        }
    }
    source = edit(
        copy("ct/W4A16"),
        config=lambda config: config["quantization_config"].update(transform_config=transform),
    )
    for to in (CT, GPTQ, "bf16"):
        assert "rotations: inputs are rotated at run time" in refusal(source, tmp_path, to).message


# Rounding again, when it is asked for


def decibels(folder, base):
    return {
        found.name: found.sqnr_db
        for found in compare(open_checkpoint(folder), open_checkpoint(base)).modules
        if found.sqnr_db is not None
    }


@pytest.mark.parametrize(
    ("name", "to", "scheme", "becomes", "rounded", "at_least_db"),
    [
        ("ct/FP8_DYNAMIC", GPTQ, None, "W8A16", 42, 38),
        ("ct/FP8_DYNAMIC", FP8, None, "FP8_BLOCK", 42, 28),
        ("ct/W5A16", GPTQ, None, "W8A16", 42, 38),
        ("ct/W8A16", AWQ, None, "W4A16_ASYM", 42, 17),
        ("ct/NVFP4", CT, "W4A16", "W4A16", 42, 15),
        ("ct/W4A16", MODELOPT, "W8A16_CHANNEL", "W8A16_CHANNEL", 42, 35),
        ("gptq/desc_act", AWQ, None, "int4 g64", 14, 17),
        ("modelopt/INT4_AWQ", CT, None, "W4A16", 12, 17),
        ("modelopt/INT8_SQ", CT, None, "W8A16_CHANNEL", 42, 35),
    ],
)
def test_requantize_rounds_to_the_nearest_scheme_within_its_error(
    sample, tmp_path, name, to, scheme, becomes, rounded, at_least_db
):
    result = export(sample(name), to=to, output=tmp_path / "out", requantize=True, scheme=scheme)
    assert {scheme.name for scheme in schemes(detect(open_checkpoint(result.output))).values()} == {
        becomes
    }
    assert (result.rounded_layers, result.notes[0]) == (
        rounded,
        f"rounded to nearest: {rounded} layers to {becomes}",
    )
    export(sample(name), to="bf16", output=tmp_path / "plain")
    found = decibels(result.output, tmp_path / "plain")
    assert min(found.values()) > at_least_db


@pytest.mark.parametrize(
    ("name", "to", "scheme", "becomes"),
    [
        ("ct/W4A8", GPTQ, None, "W4A16"),
        ("ct/W8A8", GPTQ, None, "W8A16_CHANNEL"),
        ("modelopt/FP8_PB_WO", FP8, None, "FP8_BLOCK"),
        ("ct/NVFP4", CT, "NVFP4A16", "NVFP4A16"),
        ("ct/MXFP4", CT, "MXFP4A16", "MXFP4A16"),
    ],
)
def test_where_only_inputs_differ_requantize_keeps_the_codes(
    sample, tmp_path, name, to, scheme, becomes
):
    result = export(sample(name), to=to, output=tmp_path / "out", requantize=True, scheme=scheme)
    assert result.rounded_layers == 0
    assert [note for note in result.notes if not note.startswith("inputs of 42 layers: ")] == []
    assert len(result.notes) == 1
    assert {scheme.name for scheme in schemes(detect(open_checkpoint(result.output))).values()} == {
        becomes
    }
    assert decibels(result.output, sample(name)) == {}


def test_only_the_layers_that_do_not_fit_are_rounded(sample, tmp_path):
    result = export(sample("ct/mixed"), to=GPTQ, output=tmp_path / "out", requantize=True)
    assert result.notes == (
        "rounded to nearest: 24 layers to W8A16",
        "inputs of 24 layers: fp8 token -> 16 bits",
    )
    assert "24 of them rounded to nearest" in result.summary()
    found = decibels(result.output, sample("ct/mixed"))
    assert {name.rpartition(".")[2] for name in found} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    rounded = json.loads((tmp_path / "out" / "qtool-manifest.json").read_text())["conversion"][
        "rounded"
    ]
    assert (rounded.keys(), set(rounded.values())) == (found.keys(), {"int8 g128"})


def test_a_plain_model_is_rounded_only_to_a_scheme_that_is_named(tmp_path):
    for options in ({}, {"requantize": True}):
        with pytest.raises(UsageError, match="is not quantized") as caught:
            export(EXAMPLE, to=FP8, output=tmp_path / "out", **options)
        assert caught.value.code == "E_NOT_QUANTIZED"
    result = export(EXAMPLE, to=FP8, output=tmp_path / "out", requantize=True, scheme="FP8_BLOCK")
    assert (result.source_format, result.rounded_layers) == ("16 bit", 42)
    assert {scheme.name for scheme in schemes(detect(open_checkpoint(result.output))).values()} == {
        "FP8_BLOCK"
    }
    found = decibels(result.output, EXAMPLE)
    assert len(found) == 42
    assert 28 < min(found.values()) < max(found.values()) < 36
    wanted = quantize(
        load_file(EXAMPLE / "model.safetensors")["model.layers.3.mlp.up_proj.weight"],
        SCHEMES["FP8_BLOCK"],
    )
    assert torch.equal(
        load_file(result.output / "model.safetensors")[
            "model.layers.3.mlp.up_proj.weight_scale_inv"
        ],
        wanted.scale,
    )


@pytest.mark.parametrize(
    ("to", "scheme", "constraint"),
    [
        (CT, "NVFP4A16", "scale: layers that engines fuse must share NVFP4's second scale"),
        (CT, "FP8", "input_scale: fp8 tensor static inputs need a scale that calibration finds"),
        (GPTQ, "W8A8", "activations"),
        (AWQ, "W8A16", "bits"),
        (MXFP4, "MXFP4A16", "experts"),
    ],
)
def test_a_scheme_that_rounding_cannot_make_is_refused_with_the_reason(
    tmp_path, to, scheme, constraint
):
    error = refusal(EXAMPLE, tmp_path, to, requantize=True, scheme=scheme)
    assert constraint in error.message
    assert error.hint == "choose another --scheme"


def test_a_scheme_without_requantize_is_a_mistake(sample, tmp_path):
    with pytest.raises(UsageError) as caught:
        export(sample("ct/W4A16"), to=GPTQ, output=tmp_path / "out", scheme="W8A16")
    assert (caught.value.code, caught.value.hint) == ("E_SCHEME_UNUSED", "add --requantize")


# Two formats that no backend writes here: the stacked experts of gpt-oss, and DeepSeek's blocks


@pytest.fixture
def gpt_oss(tmp_path):
    """A small gpt-oss as OpenAI publishes it, its experts in MXFP4."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "head_dim": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = GptOssConfig(
        num_hidden_layers=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=4096,
        sliding_window=32,
        **sizes,
    )
    GptOssForCausalLM(config).bfloat16().save_pretrained(tmp_path / "gpt-oss")

    def pack(tensors):
        for name in [
            name for name in tensors if name.endswith(("gate_up_proj", "experts.down_proj"))
        ]:
            experts = tensors.pop(name).transpose(1, 2)
            weight = quantize(experts.flatten(0, 1).contiguous(), SCHEMES["MXFP4A16"])
            module = QuantizedModule(
                name, SCHEMES["MXFP4A16"], weight.shape, {}, experts=experts.shape[0]
            )
            tensors |= {
                tensor_name(module, suffix): tensor.clone()
                for suffix, tensor in WRITABLE[MXFP4].write(module, weight).items()
            }

    skipped = [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ]
    own = {"quant_method": "mxfp4", "modules_to_not_convert": skipped}
    return edit(tmp_path / "gpt-oss", pack, lambda config: config.update(quantization_config=own))


def test_gpt_oss_dequantizes_to_what_transformers_makes_of_it(gpt_oss, tmp_path):
    result = export(gpt_oss, to="bf16", output=tmp_path / "out")
    theirs = plain_transformers(gpt_oss, quantization_config=Mxfp4Config(dequantize=True))
    ours = plain_transformers(result.output)
    assert {name: tensor.dtype for name, tensor in ours.state_dict().items()}.items() >= {
        "model.layers.1.mlp.experts.gate_up_proj": torch.bfloat16
    }.items()
    assert not [
        name
        for name, tensor in ours.state_dict().items()
        if not torch.equal(tensor, theirs.state_dict()[name])
    ]
    assert torch.equal(logits(ours), logits(theirs))
    assert logits(ours).std() > 0.01


def test_gpt_oss_goes_through_its_own_format_unchanged_and_to_no_other(gpt_oss, tmp_path):
    export(gpt_oss, to=MXFP4, output=tmp_path / "out")
    assert content(open_checkpoint(tmp_path / "out")) == content(open_checkpoint(gpt_oss))
    assert "experts: 4 matrices are stacked in one tensor" in refusal(gpt_oss, tmp_path, CT).message
    assert "no algorithm for MXFP4A16" in refusal(gpt_oss, tmp_path, MODELOPT).message


@pytest.fixture
def block_fp8(tmp_path):
    """A small Llama in DeepSeek's format, whose keys and values end in the middle of a block."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 384,
        "intermediate_size": 512,
        "num_attention_heads": 12,
        "num_key_value_heads": 6,
        "num_hidden_layers": 2,
    }
    LlamaForCausalLM(LlamaConfig(vocab_size=4096, **sizes)).bfloat16().save_pretrained(
        tmp_path / "llama"
    )

    def pack(tensors):
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            weight = quantize(tensors[name], SCHEMES["FP8_BLOCK"])
            tensors |= {name: weight.data, f"{name}_scale_inv": weight.scale.float()}

    own = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head"],
    }
    return edit(tmp_path / "llama", pack, lambda config: config.update(quantization_config=own))


def test_blocks_that_end_in_the_middle_go_to_every_fp8_format_and_back(block_fp8, tmp_path):
    assert open_checkpoint(block_fp8).tensors["model.layers.0.self_attn.k_proj.weight"].shape == (
        192,
        384,
    )
    before = logits(load_dequantized(open_checkpoint(block_fp8)))
    for to in (CT, MODELOPT, FP8):
        export(block_fp8, to=to, output=tmp_path / to)
        export(tmp_path / to, to=FP8, output=tmp_path / f"{to}-back")
        assert content(open_checkpoint(tmp_path / f"{to}-back")) == content(
            open_checkpoint(block_fp8)
        )
        assert torch.equal(logits(load_dequantized(open_checkpoint(tmp_path / to))), before)


def test_blocks_may_end_in_the_middle_of_the_inputs_too(tmp_path):
    source = write_layers(
        tmp_path / "source",
        {"model.layers.0.mlp.up_proj": (random_weight(200, 300), SCHEMES["FP8_BLOCK"])},
        to=FP8,
    )
    stored, name = load_file(source / "model.safetensors"), "model.layers.0.mlp.up_proj.weight"
    scale = (
        stored[f"{name}_scale_inv"]
        .float()
        .repeat_interleave(128, 0)[:200]
        .repeat_interleave(128, 1)[:, :300]
    )
    for to in (CT, MODELOPT, FP8):
        export(source, to=to, output=tmp_path / to)
        export(tmp_path / to, to=FP8, output=tmp_path / f"{to}-back")
        assert content(open_checkpoint(tmp_path / f"{to}-back")) == content(open_checkpoint(source))
        export(tmp_path / to, to="bf16", output=tmp_path / f"{to}-plain")
        assert torch.equal(
            load_file(tmp_path / f"{to}-plain" / "model.safetensors")[name],
            (stored[name].float() * scale).bfloat16(),
        )


def test_gptqmodels_reciprocals_become_factors(block_fp8, tmp_path):
    inverse = shutil.copytree(block_fp8, tmp_path / "inverse")

    def invert(tensors):
        tensors |= {
            name: 1 / tensor for name, tensor in tensors.items() if name.endswith("_scale_inv")
        }

    edit(
        inverse,
        invert,
        lambda config: config["quantization_config"].update(weight_scale_semantics="inverse"),
    )
    export(inverse, to=FP8, output=tmp_path / "out")
    assert "weight_scale_semantics" not in (tmp_path / "out" / "config.json").read_text()
    found, wanted = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "out", block_fp8)
    )
    for name, tensor in wanted.items():
        assert torch.equal(
            found[name], 1 / (1 / tensor) if name.endswith("_scale_inv") else tensor
        ), name


# Configs


def matching(dynamic, name):
    """What the engines take from ``dynamic`` for a module: the first pattern that matches, skips
    first. Source: vLLM 0.33, `gptq_utils.py`.
    """
    for pattern, options in dynamic.items():
        if re.match(pattern[2:], name):
            return False if pattern.startswith("-:") else options
    return {}


def test_dynamic_patterns_select_exactly_the_layers_they_are_meant_for(sample, tmp_path):
    export(sample("gptq/dynamic"), to=GPTQ, output=tmp_path / "out")
    dynamic = json.loads((tmp_path / "out" / "quantize_config.json").read_text())["dynamic"]
    modules = detect(open_checkpoint(tmp_path / "out")).modules
    for layer in range(2):
        for kind in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        ):
            name = f"model.layers.{layer}.{kind}"
            found = matching(dynamic, name)
            if name not in modules:
                assert (kind, found) == ("self_attn.o_proj", False)
            else:
                own = modules[name].scheme.weights
                assert (found.get("bits", 4), found.get("group_size", 128)) == (
                    own.bits,
                    own.group_size,
                )
        assert (
            matching(dynamic, f"model.layers.{layer}.self_attn.qkv_proj")
            == matching(dynamic, f"model.layers.{layer}.mlp.gate_up_proj")
            == {}
        )


def test_dynamic_patterns_also_name_the_layers_that_engines_fuse(sample, tmp_path):
    export(sample("ct/mixed"), to=GPTQ, output=tmp_path / "out", requantize=True)
    config = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    fused = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    found = {name: matching(config["dynamic"], f"model.layers.5.{name}") for name in fused}
    assert [own and {**config, **own}["bits"] for own in found.values() if own != {}] == [4, False]
    assert (config["bits"], found["self_attn.qkv_proj"], found["self_attn.o_proj"]) == (8, {}, {})


@pytest.mark.parametrize(
    ("to", "where"), [(CT, "ignore"), (MODELOPT, "ignore"), (AWQ, "modules_to_not_convert")]
)
def test_a_head_tied_to_the_embeddings_is_named_as_left_in_16_bits(sample, tmp_path, to, where):
    assert "lm_head.weight" not in open_checkpoint(sample("gptq/rtn4")).tensors
    export(sample("gptq/rtn4"), to=to, output=tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config[where] == ["lm_head"]


def test_config_keys_are_kept_and_only_the_quantization_is_replaced(copy, tmp_path):
    source = edit(
        copy("ct/W4A16"),
        config=lambda config: config.update(
            a_key_of_its_own=[1, {"x": 2}], compression_config={"old": 1}
        ),
    )
    before = json.loads((source / "config.json").read_text())
    for to in (GPTQ, "bf16"):
        export(source, to=to, output=tmp_path / to)
        after = json.loads((tmp_path / to / "config.json").read_text())
        assert {key: value for key, value in after.items() if key != "quantization_config"} == {
            key: value
            for key, value in before.items()
            if key not in ("quantization_config", "compression_config")
        }
        assert after.get("quantization_config", {}).get("quant_method") == (
            GPTQ if to == GPTQ else None
        )
    assert not (tmp_path / "bf16" / "quantize_config.json").exists()


# Files


@pytest.mark.parametrize("limit", ["1MiB", "1500kB", "3 MB"])
def test_files_end_before_max_shard_size_unless_one_tensor_is_larger(sample, tmp_path, limit):
    result = export(sample("ct/W4A16"), to=GPTQ, output=tmp_path / "out", max_shard_size=limit)
    size = {"1MiB": 1 << 20, "1500kB": 1_500_000, "3 MB": 3_000_000}[limit]
    checkpoint = open_checkpoint(result.output)
    files = sorted(path.name for path in result.output.glob("*.safetensors"))
    assert files == [
        f"model-{index + 1:05}-of-{result.files:05}.safetensors" for index in range(result.files)
    ]
    assert 1 < result.files < checkpoint.size_bytes / size + 4
    tensors = {
        name: [tensor for tensor in checkpoint.tensors.values() if tensor.file.name == name]
        for name in files
    }
    assert all(
        len(held) == 1 or sum(tensor.size_bytes for tensor in held) <= size
        for held in tensors.values()
    )
    index = json.loads((result.output / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {
        tensor.name: tensor.file.name for tensor in checkpoint.tensors.values()
    }
    assert index["metadata"]["total_size"] == sum(
        tensor.size_bytes for tensor in checkpoint.tensors.values()
    )
    widths = {"I32": 4, "F32": 4, "BF16": 2, "F16": 2, "I64": 8}
    # mapped, each can be used in place
    assert not [
        tensor.name
        for tensor in checkpoint.tensors.values()
        if tensor.offset % widths[tensor.dtype]
    ]
    assert load_file(result.output / files[0]).keys() == {
        tensor.name for tensor in tensors[files[0]]
    }


@pytest.mark.parametrize("size", ["0", "1kB", "-5GB", "5XB", "many", ""])
def test_a_shard_size_that_is_none_is_refused_before_anything_is_read(tmp_path, size):
    with pytest.raises(UsageError) as caught:
        export(tmp_path / "no such model", to=GPTQ, output=tmp_path / "out", max_shard_size=size)
    assert caught.value.code == "E_SIZE"
    assert "5GB" in caught.value.hint


def test_aux_files_are_carried_along_and_code_is_not(copy, tmp_path):
    source = copy("ct/W4A16")
    extra = {
        "tokenizer.json": "{}",
        "LICENSE": "mine",
        "chat_template.jinja": "{{ x }}",
        "modeling_own.py": "raise SystemExit",
        "notes.txt": "n",
        "optimizer.bin": "pickle",
    }
    for name, text in extra.items():
        (source / name).write_text(text)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    result = export(source, to=GPTQ, output=tmp_path / "out")
    names = {path.name for path in result.output.iterdir()}
    assert names >= {
        "tokenizer.json",
        "generation_config.json",
        "LICENSE",
        "chat_template.jinja",
        "qtool-manifest.json",
    }
    assert not names & {"modeling_own.py", "notes.txt", "optimizer.bin", "recipe.yaml"}
    assert (result.output / "tokenizer.json").read_bytes() == before["tokenizer.json"]
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    assert json.loads((result.output / "config.json").read_text()).keys() >= {
        "architectures",
        "model_type",
        "vocab_size",
    }


def test_the_manifest_tells_where_the_checkpoint_comes_from_and_what_it_is(sample, tmp_path):
    first = export(sample("ct/FP8_DYNAMIC"), to=MODELOPT, output=tmp_path / "first").output
    second = export(first, to=CT, output=tmp_path / "second", max_shard_size="2MB").output
    manifest = json.loads((second / "qtool-manifest.json").read_text())
    assert manifest["conversion"] == {"from": MODELOPT, "to": CT, "rounded": {}, "notes": []}
    assert manifest["source_manifest"]["conversion"]["from"] == CT
    assert "files" not in manifest["source_manifest"]
    assert manifest["source_files"].keys() == {"model.safetensors"}
    assert manifest["files"] == {
        path.name: {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "size_bytes": path.stat().st_size,
        }
        for path in second.iterdir()
        if path.name != "qtool-manifest.json"
    }


def test_the_output_never_touches_what_is_there(sample, copy, tmp_path):
    source = copy("ct/W4A16")
    for place in (source, source / "inside", source.parent):
        with pytest.raises(UsageError) as caught:
            export(source, to=GPTQ, output=place)
        assert caught.value.code == "E_OUTPUT_PLACE"
    taken = shutil.copytree(sample("ct/FP8"), tmp_path / "taken")
    with pytest.raises(OutputTaken) as caught:
        export(source, to=GPTQ, output=taken)
    assert (caught.value.code, detect(open_checkpoint(taken)).format) == ("E_OUTPUT_EXISTS", CT)
    export(source, to=GPTQ, output=taken, overwrite=True)
    assert detect(open_checkpoint(taken)).format == GPTQ
    assert {path.name for path in tmp_path.iterdir()} == {"copy", "taken"}


@pytest.mark.parametrize(
    ("to", "spoiled", "value", "named"),
    [
        (
            GPTQ,
            "model.layers.1.mlp.up_proj.weight_scale",
            float("nan"),
            "model.layers.1.mlp.up_proj.scales",
        ),
        (GPTQ, "model.embed_tokens.weight", float("inf"), "model.embed_tokens.weight"),
        (
            "bf16",
            "model.layers.1.mlp.up_proj.weight_scale",
            float("nan"),
            "model.layers.1.mlp.up_proj.weight",
        ),
        ("f16", "model.norm.weight", 1e30, "model.norm.weight"),
        (
            "f16",
            "model.layers.1.mlp.up_proj.weight_scale",
            1e5,
            "model.layers.1.mlp.up_proj.weight",
        ),
    ],
)
def test_numbers_that_are_none_are_never_published(copy, tmp_path, to, spoiled, value, named):
    source = edit(copy("ct/W4A16"), lambda tensors: tensors[spoiled].view(-1)[:1].fill_(value))
    with pytest.raises(CheckpointRefused, match=f"`{named}` holds NaN or infinity") as caught:
        export(source, to=to, output=tmp_path / "out")
    assert caught.value.code == "E_VALUES"
    assert {path.name for path in tmp_path.iterdir()} == {"copy"}


def test_codes_that_belong_to_no_layer_are_not_passed_off_as_weights(copy, tmp_path):
    """Stacked FP8 experts, which no format here reads: copied, they would be garbage under a config
    that says nothing of them.
    """
    experts = {
        "model.layers.0.mlp.experts.gate_up_proj": torch.zeros(2, 64, 32, dtype=torch.float8_e4m3fn)
    }
    source = edit(copy("ct/FP8_BLOCK"), lambda tensors: tensors.update(experts))
    for to in ("bf16", CT, FP8):
        assert (
            "layout: `model.layers.0.mlp.experts.gate_up_proj` holds F8_E4M3"
            in refusal(source, tmp_path, to).message
        )


@pytest.mark.parametrize("name", ["gptq/rtn4", "gptq/rtn_gemm"])
def test_zero_points_that_deny_symmetry_are_not_dropped(copy, tmp_path, name):
    zeros = "model.layers.1.mlp.up_proj.qzeros"
    source = edit(copy(name), lambda tensors: tensors[zeros].fill_(0x33333333))
    with pytest.raises(CheckpointRefused, match="zero points are 3") as caught:
        export(source, to=CT, output=tmp_path / "out")
    assert caught.value.code == "E_ZERO_POINT"
    assert not (tmp_path / "out").exists()


def test_a_nan_among_the_scales_of_stacked_experts_is_found(gpt_oss, tmp_path):
    scales = "model.layers.0.mlp.experts.down_proj_scales"
    edit(gpt_oss, lambda tensors: tensors[scales].view(-1)[-1:].fill_(255))
    with pytest.raises(CheckpointRefused, match=rf"`{scales}` holds a NaN scale") as caught:
        export(gpt_oss, to="mxfp4", output=tmp_path / "out")
    assert caught.value.code == "E_VALUES"


def test_a_write_that_fails_on_its_way_to_the_disk_is_no_success(sample, tmp_path, monkeypatch):
    def fail(path):
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(importlib.import_module("qtool.conversion.streaming"), "make_durable", fail)
    with pytest.raises(OSError, match="Input/output error"):
        export(sample("ct/W4A16"), to=GPTQ, output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_more_files_than_a_process_may_open_are_written(sample, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(list(Path("/proc/self/fd").iterdir()))
    layers = {
        f"model.layers.{layer}.mlp.up_proj": (random_weight(1024, 1024), SCHEMES["FP8_DYNAMIC"])
        for layer in range(40)
    }
    source = write_layers(tmp_path / "source", layers)
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 25, hard))
    try:
        assert (
            export(source, to=MODELOPT, output=tmp_path / "out", max_shard_size="1MiB").files >= 40
        )
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_options_of_the_other_way_to_export_are_mistakes(sample, tmp_path):
    for options in (
        {"to": GPTQ, "method": "modelopt_fp8"},
        {"checkpoint_restore_path": "state", "requantize": True},
    ):
        with pytest.raises(UsageError) as caught:
            export(sample("ct/W4A16"), output=tmp_path / "out", **options)
        assert caught.value.code == "E_EXPORT_UNUSED"


def test_a_disk_that_is_too_small_is_seen_before_anything_is_written(sample, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=20_000_000))
    with pytest.raises(
        ResourceError, match=r"\d\d\.\d\d MB are needed for the output and 20\.00 MB are free"
    ) as caught:
        export(sample("ct/W4A16"), to="bf16", output=tmp_path / "out")
    assert caught.value.code == "E_DISK"
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["middle", "checking"])
def test_killed_at_any_moment_it_leaves_no_checkpoint_and_the_next_run_cleans_up(
    sample, tmp_path, moment
):
    code = """if True:
        import os, signal, sys
        from qtool.conversion import export
        def die(event):
            done = getattr(event, "done", -1) >= {"middle": 3, "checking": 1e9}[sys.argv[3]]
            if done or getattr(event, "what", None) == "checking the result":
                os.kill(os.getpid(), signal.SIGKILL)
        export(sys.argv[1], to="gptq", output=sys.argv[2], max_shard_size="1MiB", on_event=die)"""
    run = subprocess.run(
        [sys.executable, "-c", code, sample("ct/W4A16"), tmp_path / "out", moment],
        capture_output=True,
        text=True,
    )
    assert run.returncode == -9, run.stderr
    assert {path.name for path in tmp_path.iterdir()} == {".out.qtool"}
    export(sample("ct/W4A16"), to=GPTQ, output=tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_an_error_in_the_middle_leaves_nothing(sample, tmp_path):
    def fail(event):
        if isinstance(event, ProgressEvent):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(sample("ct/W4A16"), to=GPTQ, output=tmp_path / "deep" / "out", on_event=fail)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_converting_holds_less_than_two_files_in_memory(tmp_path):
    layer = random_weight(1024, 1024), SCHEMES["W4A16"]
    source = write_layers(
        tmp_path / "source", {f"model.layers.{number}.mlp.up_proj": layer for number in range(300)}
    )
    code = """if True:
        import re, sys
        from pathlib import Path
        from qtool.conversion import export, plan, streaming
        def peak_mb():
            return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
        before = peak_mb()
        assert export(sys.argv[1], to="bf16", output=sys.argv[2], max_shard_size="200MiB").files == 3
        print(peak_mb() - before)"""
    run = subprocess.run(
        [sys.executable, "-c", code, source, tmp_path / "out"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(run.stdout) < 400


# The command


@pytest.mark.slow
def test_the_command_converts_and_says_what_it_did(run_cli, sample, tmp_path):
    result = run_cli(
        "export", "--model-path", sample("ct/W4A16"), "--to", "gptq", "--output", "out"
    )
    assert result.exit_code == 0
    assert re.fullmatch(
        rf"{tmp_path}/out: compressed-tensors -> gptq, 42 layers, codes and scales unchanged, [\d.]+ s\nsize: [\d.]+ MB -> [\d.]+ MB in 1 file\n",
        result.stdout,
    )
    assert "converting" in result.stderr
    again = run_cli(
        "export",
        "--model",
        "out",
        "--to",
        "bf16",
        "-o",
        "plain",
        "--json",
        "--quiet",
        "--max-shard-size",
        "4MB",
    )
    data = json.loads(again.stdout)
    wanted = {
        "source_format": GPTQ,
        "format": "bf16",
        "layers": 42,
        "rounded_layers": 0,
        "files": 3,
        "output": str(tmp_path / "plain"),
    }
    assert (again.stderr, data | wanted) == ("", data)


@pytest.mark.parametrize(
    ("arguments", "exit_code", "code", "says"),
    [
        (["--to", "gtpq"], 2, "E_UNKNOWN_FORMAT", "did you mean `gptq`"),
        ([], 2, "E_EXPORT_WHAT", "--checkpoint-restore-path STATE"),
        (["--to", "gptq", "--checkpoint-restore-path", "state"], 2, "E_EXPORT_WHAT", "--to"),
    ],
)
def test_the_command_refuses_with_code_and_hint_on_stderr(
    run_cli, sample, tmp_path, arguments, exit_code, code, says
):
    result = run_cli(
        "export", "--model-path", sample("ct/W8A16"), "--output", "out", *arguments, "--json"
    )
    assert (result.exit_code, json.loads(result.stdout)["error"]["code"]) == (exit_code, code)
    assert f"error[{code}]" in result.stderr
    assert says in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["fp8", "FP16", "compressed_tensors", "gptq-v2", "BFloat16", "awq"]
)
def test_formats_may_be_spelled_as_people_do(name):
    from qtool.conversion.targets import target_named

    assert target_named(name) in TARGETS
