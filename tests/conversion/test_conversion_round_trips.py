"""Every sample goes to every format that holds it, and stays the same model."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file
from support.conversion import (
    AWQ,
    CT,
    FP8,
    GPTQ,
    GPTQ_V2,
    MODELOPT,
    content,
    edit,
    home,
    logits,
    plain_transformers,
    random_weight,
    refusal,
    schemes,
    write_layers,
)

from qtool.checkpoint import open_checkpoint
from qtool.checkpoint.shards import Shards
from qtool.conversion import TARGETS, export
from qtool.conversion.targets import GGUF, UNQUANTIZED
from qtool.evaluation.perplexity import load_dequantized
from qtool.formats import detect, read
from qtool.formats.packing import read_tensor
from qtool.scheme import SCHEMES
from qtool.weight import dequantize

pytestmark = pytest.mark.usefixtures("one_thread")
pytest_plugins = ["support.sample_plugin"]

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
    ): """ct/FP8_DYNAMIC ct/kv_fp8 modelopt/FP8_PC_PT modelopt/FP8_PB_WO
        ct/NVFP4 ct/NVFP4A16 modelopt/NVFP4 modelopt/W4A16_NVFP4
        ct/MXFP4 ct/MXFP8 modelopt/MXFP4 modelopt/MXFP8 ct/mixed modelopt/MIXED modelopt/INT8""",
    (CT,): """ct/W5A16 ct/W5A16_ASYM ct/W6A16 ct/W7A16 ct/W4A8 ct/W4AFP8 ct/W8A8 ct/W8A8_STATIC_ASYM
        ct/fp8_weight_only ct/MXFP4A16 ct/MXFP8A16""",
    (MODELOPT,): (
        "modelopt/INT4_AWQ modelopt/INT8_SQ modelopt/W4A8_AWQ modelopt/W4A8_MXFP4_FP8 "
        "modelopt/W4A8_NVFP4_FP8"
    ),
}
HELD = {name: targets for targets, names in TABLE.items() for name in names.split()}
ALIKE = {  # samples that another sample of the same row stands for
    *("gptq/rtn4", "gptq/asym_v2", "ct/W2A16", "gptq/channel2", "gptq/gptq3", "modelopt/FP8"),
    *("ct/FP8_DYNAMIC", "modelopt/FP8_PC_PT", "ct/NVFP4A16", "modelopt/NVFP4", "ct/MXFP8"),
    *("modelopt/MXFP4", "ct/W5A16", "ct/W6A16", "ct/W7A16", "ct/W4AFP8", "ct/W8A8"),
    *("ct/MXFP8A16", "modelopt/INT4_AWQ", "modelopt/W4A8_NVFP4_FP8"),
}
IN_PIECES = ("ct/NVFP4", "gptq/desc_act", "modelopt/FP8_KV")  # in files of 1 MiB


@pytest.mark.parametrize("name", [name for name in HELD if name not in ALIKE])
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
        # GGUF needs a tokenizer, which samples have not: test_conversion_gguf
        if to not in (*HELD[name], *UNQUANTIZED, GGUF):
            refusal(sample(name), tmp_path, to)


def test_every_sample_stands_in_the_table(sample):
    folders = [
        path
        for library in ("ct", "gptq", "modelopt")
        for path in (sample(library)).iterdir()
        if (path / "config.json").exists() and path.name != "short-model"
    ]
    assert {f"{path.parent.name}/{path.name}" for path in folders} == set(HELD)


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
    for module in ("formats.stored_layer", "conversion.streaming"):
        monkeypatch.setattr(f"qtool.{module}.read_tensor", count_reads)
    export(sample(name), to=to, output=tmp_path / "out")
    assert reads.keys() <= open_checkpoint(sample(name)).tensors.keys()
    assert max(reads.values()) == 1


@pytest.mark.slow
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
