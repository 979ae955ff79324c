"""ModelOpt writes the FP8 experts of gpt-oss and Llama 4 in stacks; they become single layers."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool.backends.modelopt_stacks import split_stacks
from qtool.name_map import LinearWeight, NameMap

EXPERTS, INPUTS, OUTPUTS = 2, 4, 6
STACK = "model.layers.0.mlp.experts.gate_up_proj"


def names(*, is_interleaved):
    linears = [
        LinearWeight(
            f"model.layers.0.mlp.experts.{expert}.{kind}",
            (OUTPUTS // 2, INPUTS),
            STACK,
            "model.layers.0.mlp.experts",
            "gate_up_proj",
            expert=expert,
            part=part,
            parts=2,
            is_stacked=True,
            is_transposed=True,
            is_interleaved=is_interleaved,
        )
        for expert in range(EXPERTS)
        for part, kind in enumerate(("gate_proj", "up_proj"))
    ]
    by_name = {each.name: each for each in linears}
    return NameMap(by_name, unused={}, not_linear={}, renamed={})


@pytest.mark.parametrize("is_interleaved", [True, False])
def test_a_stack_becomes_gate_and_up_of_each_expert_with_its_scales(is_interleaved, tmp_path):
    stack = torch.arange(EXPERTS * INPUTS * OUTPUTS).reshape(EXPERTS, INPUTS, OUTPUTS).float()
    bias = torch.arange(EXPERTS * OUTPUTS).reshape(EXPERTS, OUTPUTS).bfloat16()
    written = {STACK: stack.to(torch.float8_e4m3fn), f"{STACK}_bias": bias}
    written["model.norm.weight"] = torch.ones(INPUTS)
    save_file(written, tmp_path / "model-00001-of-00002.safetensors")
    scales = {"weight_scale": torch.tensor(0.5), "input_scale": torch.tensor(2.0)}
    in_file = {f"{STACK}_{part}": scale for part, scale in scales.items()}
    save_file(in_file, tmp_path / "model-00002-of-00002.safetensors")
    split_stacks(tmp_path, names(is_interleaved=is_interleaved))
    found = load_file(tmp_path / "model-00001-of-00002.safetensors")
    assert found.pop("model.norm.weight").tolist() == [1] * INPUTS
    assert len(found) == EXPERTS * 2 * 4
    outputs = slice(1, None, 2) if is_interleaved else slice(OUTPUTS // 2, None)
    up = "model.layers.0.mlp.experts.1.up_proj"
    assert torch.equal(found[f"{up}.weight"].float(), written[STACK][1].float().T[outputs])
    assert torch.equal(found[f"{up}.bias"], bias[1][outputs])
    assert (found[f"{up}.weight_scale"], found[f"{up}.input_scale"]) == (0.5, 2.0)
    assert load_file(tmp_path / "model-00002-of-00002.safetensors") == {}


def test_a_stack_without_scales_stays(tmp_path):
    save_file({STACK: torch.zeros(EXPERTS, INPUTS, OUTPUTS)}, tmp_path / "model.safetensors")
    split_stacks(tmp_path, names(is_interleaved=False))
    assert list(load_file(tmp_path / "model.safetensors")) == [STACK]
