"""Quantized stacks of experts are read expert by expert, or refused for what is wrong with them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.published import PUBLISHED
from support.published.floats import fp8_block, fp8_channel, nvfp4

from qtool import formats
from qtool.architecture import check_model
from qtool.checkpoint import open_checkpoint
from qtool.errors import CheckpointRefused
from qtool.formats.packing import read_stored
from qtool.weight import dequantize

E, N, K = 3, 128, 256
EXPERTS = "model.layers.0.mlp.experts"
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
CHANNELS = {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}
NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}


def stacks(quantizer, *, is_transposed=False, of_parts=False):
    """Stacks of random experts by what stands behind their names, and each layer dequantized."""
    generator = torch.Generator().manual_seed(0)
    tensors, expected = {}, {}
    for projection, kinds in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", None)):
        found = {}
        for expert in range(E):
            for kind in kinds or (projection,):
                shape = (N, K) if kinds else (K, N)
                parts, dense = quantizer(torch.randn(shape, generator=generator))
                expected[f"{EXPERTS}.{expert}.{kind}"] = dense
                for suffix, part in parts.items():
                    found.setdefault(suffix, []).append(part)
        for suffix, each in found.items():
            last = {"weight": "", "weight_scale_inv": "_scale_inv"}.get(suffix, f"_{suffix}")
            stack = torch.stack(each)
            if kinds and stack.dim() > 1:
                stack = stack.unflatten(0, (E, 2)).flatten(1, 2)
            elif kinds:
                stack = stack.reshape(E, 2)
            order = is_transposed and stack.dim() == 3
            tensors[f"{EXPERTS}.{projection}{last}"] = stack.mT if order else stack
    return tensors, expected


def write(folder, tensors, config, *, hidden=K):
    folder.mkdir()
    save_file({name: each.contiguous() for name, each in tensors.items()}, folder / "a.safetensors")
    whole = {"hidden_size": hidden, "model_type": "qwen3_vl_moe", "quantization_config": config}
    (folder / "config.json").write_text(json.dumps(whole))
    return open_checkpoint(folder)


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize(
    ("quantizer", "config"),
    [
        pytest.param(fp8_block, FP8, id="blocks"),
        pytest.param(fp8_channel, CHANNELS, id="a-scale-for-each-output"),
        pytest.param(lambda x: fp8_channel(x, flat=True), CHANNELS, id="the-same-flat"),
        pytest.param(lambda x: nvfp4(x, input_amax=4.0), NVFP4, id="gate-and-up-have-own-scales"),
    ],
)
def test_each_expert_is_a_layer_with_its_part_of_all_that_lies_in_stacks(
    tmp_path, quantizer, config, is_transposed
):
    tensors, expected = stacks(quantizer, is_transposed=is_transposed)
    checkpoint = write(tmp_path / "model", tensors, config)
    assert set(checkpoint.expert_stacks) == {f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"}
    layout = formats.detect(checkpoint)
    assert set(layout.modules) == set(expected)
    for name, weight in expected.items():
        assert torch.equal(dequantize(formats.read(checkpoint, layout, name)), weight), name
    for info in checkpoint.tensors.values():  # as a copy reads them
        assert info.read() == read_stored(info).reshape(-1).view(torch.uint8).numpy().tobytes()


LLAMA = "model.layers.0.feed_forward.experts"
GEMMA = "model.layers.0.experts"
SCALE = f"{GEMMA}.gate_up_proj_scale_inv"
GATE_UP = f"{GEMMA}.gate_up_proj"
DOWN = f"{GEMMA}.down_proj"


def changed(name, change):
    def damage(tensors, config):
        tensors[name] = change(tensors[name]).contiguous()

    return damage


def removed(name):
    return lambda tensors, config: tensors.pop(name)


def added(name, tensor):
    return lambda tensors, config: tensors.update({name: tensor})


def configured(**fields):
    return lambda tensors, config: config["quantization_config"].update(fields)


DAMAGES = {
    "one expert less": (changed(DOWN, lambda x: x[:3]), "E_SCALE_SHAPE", "scales of 3 experts"),
    "no expert": (changed(DOWN, lambda x: x[:0]), "E_TENSOR_SHAPE", "hidden size is 256"),
    "gate without up": (changed(GATE_UP, lambda x: x[:, :129]), "E_TENSOR_SHAPE", "blocks of 128"),
    "another hidden size": (changed(DOWN, lambda x: x[:, :240]), "E_TENSOR_SHAPE", "size is 256"),
    "another inner size": (changed(DOWN, lambda x: x[..., :64]), "E_TENSORS", "down_proj"),
    "two orders": (changed(GATE_UP, lambda x: x[..., :128]), "E_TENSOR_SHAPE", "in the order of"),
    "no scale": (removed(SCALE), "E_MISSING_TENSOR", "gate_up_proj_scale_inv"),
    "no stack": (removed(DOWN), "E_TENSORS", "down_proj"),
    "a scale too many": (changed(SCALE, lambda x: x[:, :1]), "E_SCALE_SHAPE", "gate_proj as for"),
    "four dimensions": (changed(SCALE, lambda x: x[..., None]), "E_SCALE_SHAPE", "one scale"),
    "blocks of gate and up": (configured(weight_block_size=[96, 96]), "E_TENSOR_SHAPE", "of 96"),
    "a layer beside it": (
        added(f"{GEMMA}.3.down_proj.weight", torch.zeros(256, 128)),
        "E_DUPLICATE",
        "one layer",
    ),
    "a bias": (added(f"{DOWN}_bias", torch.zeros(4, 256)), "E_EXPERT_STACK", "does not read"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_stack_that_fits_neither_its_scales_nor_the_config_is_refused(tmp_path, name):
    damage, code, words = DAMAGES[name]
    folder = tmp_path / "model"
    PUBLISHED["transformers-fp8-experts"](folder)
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    damage(tensors, config)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointRefused) as error:
        checkpoint = open_checkpoint(folder)
        check_model(checkpoint, formats.detect(checkpoint))
    assert error.value.code == code
    assert words in error.value.message


def test_stacks_of_llama_4_are_in_its_order_alone(tmp_path):
    folder = tmp_path / "model"
    PUBLISHED["nvidia-llama-4-fp8"](folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{LLAMA}.down_proj"] = tensors[f"{LLAMA}.down_proj"].mT.contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointRefused, match="hidden size is 256"):
        open_checkpoint(folder)


def test_experts_without_end_are_refused_before_they_are_listed(tmp_path):
    tensors = {
        f"{EXPERTS}.down_proj": torch.zeros(300_000, 8, 1, dtype=torch.float8_e4m3fn),
        f"{EXPERTS}.down_proj_scale_inv": torch.ones(()),
    }
    with pytest.raises(CheckpointRefused, match="600,000 tensors of experts"):
        write(tmp_path / "model", tensors, FP8, hidden=8)


@pytest.mark.slow
def test_stacks_are_what_transformers_saves(tmp_path, monkeypatch):
    from support.published.stacks import GEMMA_4
    from transformers import AutoConfig, FineGrainedFP8Config, Gemma4ForCausalLM
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    # it quantizes on any device, and asks for a GPU because it could not run here
    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *_, **__: None)
    Gemma4ForCausalLM(AutoConfig.for_model(**GEMMA_4)).save_pretrained(tmp_path / "dense")
    Gemma4ForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=FineGrainedFP8Config(), dtype=torch.bfloat16
    ).save_pretrained(tmp_path / "model")
    PUBLISHED["transformers-fp8-experts"](tmp_path / "small")
    shapes = [
        {
            name: (tensor.dtype, tensor.shape)
            for name, tensor in load_file(tmp_path / folder / "model.safetensors").items()
            if ".experts." in name or "_proj" in name
        }
        for folder in ("model", "small")
    ]
    assert shapes[0] == shapes[1]
