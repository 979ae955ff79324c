"""What a format cannot hold is refused, with the constraint and the layer."""

from __future__ import annotations

import re

import pytest
import torch
from support.conversion import (
    AWQ,
    CT,
    FP8,
    GPTQ,
    MODELOPT,
    MXFP4,
    content,
    edit,
    random_weight,
    refusal,
    schemes,
    write_layers,
)

from qtool.checkpoint import open_checkpoint
from qtool.conversion import export
from qtool.errors import CheckpointRefused
from qtool.formats import detect
from qtool.scheme import SCHEMES, Activations, Scheme, Weights

pytestmark = pytest.mark.usefixtures("one_thread")
pytest_plugins = ["support.sample_plugin"]


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


def test_a_model_without_linear_layers_is_refused_before_anything_is_written(make_model, tmp_path):
    tensors = {"h.0.attn.c_attn.weight": (64, 192)}
    folder = make_model(tensors, model_type="gpt2")
    before = {*tmp_path.iterdir()}
    with pytest.raises(CheckpointRefused, match="no layer") as caught:
        export(folder, to=CT, output=tmp_path / "out", requantize=True, scheme="FP8_DYNAMIC")
    assert caught.value.code == "E_NOTHING_TO_DO"
    assert {*tmp_path.iterdir()} == before
