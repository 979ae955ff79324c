"""Configs of published layouts, changed: what they then say, or why they are refused."""

import json
from functools import partial

import pytest
import torch
from support.published import PUBLISHED
from support.published.floats import fp8_block, fp8_channel, mxfp4, nvfp4
from support.published.models import llama, qwen3_moe, random_tensors, write

from qtool.checkpoint import open_checkpoint
from qtool.errors import CheckpointRefused
from qtool.formats import detect, read
from qtool.inspection.engines import check_engine
from qtool.scheme import Scheme, Weights
from qtool.weight import dequantize

MX = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "is_dynamic": False}
MX_INPUT = {**MX, "is_dynamic": True}
CHANNEL = {"dtype": "fp8_e4m3", "qscheme": "per_channel", "is_dynamic": False}


def changed(folder, name, change):
    """Return the layout ``name`` after ``change`` of its quantization config."""
    PUBLISHED[name](folder)
    file = folder / "config.json"
    whole = json.loads(file.read_text())
    change(whole["quantization_config"])
    file.write_text(json.dumps(whole))
    return detect(open_checkpoint(folder))


TABLE = "model.layers.0.ple.ple_embedding.ngram_embedding"


@pytest.mark.parametrize(
    ("config", "matrix", "scale"),
    [
        (
            {
                "quant_method": "modelopt",
                "quant_algo": "MIXED_PRECISION",
                "quantized_layers": {
                    **{f"model.layers.{index}.mlp": {"quant_algo": "NVFP4"} for index in (0, 1)},
                    TABLE: {"quant_algo": "FP8"},
                },
            },
            partial(nvfp4, input_amax=4.0),
            "weight_scale",
        ),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, fp8_block, "weight_scale_inv"),
    ],
    ids=["ModelOpt", "fp8"],
)
@pytest.mark.parametrize("is_shared", [True, False])
def test_a_table_in_shards_is_read_with_one_scale_or_several(
    tmp_path, config, matrix, scale, is_shared
):
    """Qwen3.8-Flash-Next by NVIDIA and in FP8: rows are looked up, so no input is rounded."""
    shards = [f"{TABLE}.shard_{index}" for index in (0, 1)]
    codes = random_tensors(dict.fromkeys(shards, (64, 32)))
    tensors = {f"{name}.weight": codes[name].to(torch.float8_e4m3fn) for name in shards}
    owners = [TABLE] if is_shared else shards
    tensors |= {f"{owner}.{scale}": torch.tensor(0.01).bfloat16() for owner in owners}
    model, weights = llama()
    model |= {"model_type": "qwen4_exp_text"}
    write(tmp_path / "model", (model, weights), {"mlp": matrix}, config, tensors=tensors)
    checkpoint = open_checkpoint(tmp_path / "model")
    layout = detect(checkpoint)
    assert layout.warnings == ()
    for name in shards:
        assert layout.modules[name].scheme == Scheme(Weights("fp8", "tensor"))
        found = dequantize(read(checkpoint, layout, name))
        expected = tensors[f"{name}.weight"].float() * torch.tensor(0.01).bfloat16().float()
        assert torch.equal(found, expected)
    for engine in ("vllm", "sglang"):
        findings = check_engine(checkpoint, layout, engine).findings
        assert "E_ENGINE_EMBEDDING" not in [each.code for each in findings]


def test_a_pattern_of_quark_may_tell_one_expert_from_the_others(tmp_path):
    config = {
        "quant_method": "quark",
        "global_quant_config": {"weight": MX, "input_tensors": MX_INPUT},
        "layer_quant_config": {"*.experts.2.*": {"weight": CHANNEL}},
        "exclude": ["re:.*self_attn.*", "*.mlp.gate", "lm_head"],
    }
    write(tmp_path / "model", qwen3_moe(), {r"experts\.2": fp8_channel, "experts": mxfp4}, config)
    layout = detect(open_checkpoint(tmp_path / "model"))
    assert {
        name: module.scheme.name for name, module in layout.modules.items() if "layers.0" in name
    } == {
        f"model.layers.0.mlp.experts.{expert}.{kind}_proj": "FP8_W8A16" if expert == 2 else "MXFP4"
        for expert in range(4)
        for kind in ("gate", "up", "down")
    }


def test_a_layer_that_a_mixture_forgets_is_read_by_its_tensors_with_a_warning(tmp_path):
    name = "model.layers.1.mlp.down_proj"

    def forget(config):
        config["quantized_layers"].pop(name)

    layout = changed(tmp_path / "model", "modelopt-mixed-fused-names", forget)
    assert layout.modules[name].scheme.name == "NVFP4"
    assert layout.warnings == (f"`{name}` is quantized and `quantized_layers` lacks it",)


@pytest.mark.parametrize(
    ("name", "change", "code", "words"),
    [
        (
            "amd-llama-ptpc-fp8",
            lambda config: config["global_quant_config"]["weight"].update(dtype="int8"),
            "E_QUANT_CONFIG",
            "int8",
        ),
        (
            "amd-llama-ptpc-fp8",
            lambda config: config["global_quant_config"]["weight"].update(dtype="fp6_e2m3"),
            "E_QUANT_ALGORITHM",
            "FP6",
        ),
        (
            "amd-llama-ptpc-fp8",
            lambda config: config["global_quant_config"]["input_tensors"].update(dtype="fp6_e3m2"),
            "E_QUANT_ALGORITHM",
            "fp6_e3m2",
        ),
        (
            "nvidia-llama-nvfp4",
            lambda config: config.update(quant_algo="FP8"),
            "E_QUANT_CONFIG",
            "FP8",
        ),
        (
            "neuralmagic-llama-3-fp8-kv",
            lambda config: config.update(activation_scheme="sometimes"),
            "E_QUANT_CONFIG",
            "activation_scheme",
        ),
        (
            "qwen3-fp8-ue8m0",
            lambda config: config.update(weight_block_size=[0, 128]),
            "E_QUANT_CONFIG",
            "weight_block_size",
        ),
        (
            "redhat-fp8-block",
            lambda config: config["config_groups"]["group_0"]["weights"].update(
                block_structure="129x128"
            ),
            "E_QUANT_CONFIG",
            "block_structure",
        ),
    ],
)
def test_a_config_that_denies_the_tensors_is_refused(tmp_path, name, change, code, words):
    with pytest.raises(CheckpointRefused, match=words) as caught:
        changed(tmp_path / "model", name, change)
    assert caught.value.code == code
    assert "download" not in caught.value.hint
