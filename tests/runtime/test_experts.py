"""Experts that a checkpoint has one by one and transformers in stacks."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.published.gptq import GPTQ
from support.published.integers import gptq
from support.published.models import qwen3_moe, write
from support.small_models import WEIGHTS, publish

import qtool
from qtool.architecture import map_names
from qtool.checkpoint import open_checkpoint
from qtool.evaluation.perplexity import load_dequantized
from qtool.formats.packing import expert_matrix
from qtool.runtime.kernels.native import native_library

pytest_plugins = ["support.sample_plugin"]
pytestmark = pytest.mark.usefixtures("one_thread")


def split_experts(folder) -> None:
    """Write the stacks of a checkpoint as engines and quantizers have them: one by one."""
    stacks = map_names(open_checkpoint(folder)).stacks
    tensors = load_file(folder / WEIGHTS)
    for name, experts in stacks.items():
        stack, biases = tensors.pop(name), tensors.pop(f"{name}_bias", None)
        for linear in experts:
            tensors[f"{linear.name}.weight"] = expert_matrix(stack, linear).contiguous()
            if biases is not None:
                columns = replace(linear, is_transposed=False)
                tensors[f"{linear.name}.bias"] = expert_matrix(biases, columns).contiguous()
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


@pytest.mark.filterwarnings("ignore:only the language model is loaded")
@pytest.mark.parametrize(
    "architecture",
    [
        "gpt_oss",  # gate and up alternate, and biases
        "llama4",  # one batched product for all experts
        "qwen3_5_moe",
    ],
)
def test_experts_one_by_one_compute_what_the_stack_does(architecture, tmp_path):
    folder, model = publish(architecture, tmp_path / "model", torch.float32)
    ids = torch.arange(8, 40)[None]
    expected = model(input_ids=ids, use_cache=False).logits
    split_experts(folder)
    loaded = qtool.load(folder, device="cpu", dtype="float32")
    found = loaded(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_gate_and_up_that_alternate_are_right_when_they_are_quantized(tmp_path):
    folder, _ = publish("gpt_oss", tmp_path / "model")
    split_experts(folder)
    out = tmp_path / "out"
    qtool.export(folder, to="compressed-tensors", scheme="W8A16", requantize=True, output=out)
    ids = torch.arange(8, 40)[None]
    found = qtool.load(out, device="cpu", dtype="float32")(input_ids=ids, use_cache=False).logits
    dequantized = load_dequantized(open_checkpoint(out), dtype=torch.float32)
    expected = dequantized(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)


def test_experts_with_act_order_run_one_by_one_and_say_so(tmp_path):
    if isinstance(reason := native_library(), str):
        pytest.skip(f"the native kernel does not run here: {reason}")
    folder = tmp_path / "model"
    layers = {r"\.experts\.": partial(gptq, act_order=True)}
    write(folder, qwen3_moe(), layers, {**GPTQ, "desc_act": True})
    with pytest.warns(RuntimeWarning, match="experts of 2 layers .*act-order") as seen:
        loaded = qtool.load(folder, device="cpu")
    assert len([each for each in seen if "act-order" in str(each.message)]) == 1
    ids = torch.arange(8, 40)[None]
    found = loaded(input_ids=ids, use_cache=False).logits
    expected = load_dequantized(open_checkpoint(folder))(input_ids=ids, use_cache=False).logits
    assert (found - expected).norm() < 1e-2 * expected.norm()
