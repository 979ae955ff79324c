"""Formats that no backend writes: gpt-oss's stacked experts and DeepSeek's blocks."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file
from support.conversion import (
    CT,
    FP8,
    MODELOPT,
    MXFP4,
    content,
    edit,
    logits,
    plain_transformers,
    random_weight,
    refusal,
    write_layers,
)
from transformers import (
    Mxfp4Config,
)

from qtool.checkpoint import open_checkpoint
from qtool.conversion import export
from qtool.evaluation.perplexity import load_dequantized
from qtool.scheme import SCHEMES

pytestmark = pytest.mark.usefixtures("one_thread")
pytest_plugins = ["support.sample_plugin"]


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
    again = {"requantize": True, "scheme": "FP8_DYNAMIC", "output": tmp_path / "again"}
    note = export(result.output, to=CT, **again).notes[0]
    assert note.startswith("4 stacks of experts stay in 16 bits, ")


def test_gpt_oss_goes_through_its_own_format_unchanged_and_to_no_other(gpt_oss, tmp_path):
    export(gpt_oss, to=MXFP4, output=tmp_path / "out")
    assert content(open_checkpoint(tmp_path / "out")) == content(open_checkpoint(gpt_oss))
    assert "experts: 4 matrices are stacked in one tensor" in refusal(gpt_oss, tmp_path, CT).message
    assert "no algorithm for MXFP4A16" in refusal(gpt_oss, tmp_path, MODELOPT).message


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
