"""The example that makes outlier channels changes the numbers and not the function."""

from __future__ import annotations

import runpy

import torch
from safetensors.torch import load_file
from support import EXAMPLE

from qtool.checkpoint import open_checkpoint
from qtool.scheme import SCHEMES
from qtool.weight import dequantize, quantize

pytest_plugins = ["support.sample_plugin"]


def test_outliers_leave_the_logits_equal_and_rounding_them_costs_more(one_thread, tmp_path):
    script = runpy.run_path(str(EXAMPLE.parent / "outlier_model.py"))
    script["make_outlier_model"](EXAMPLE, tmp_path / "model")
    assert script["is_same_function"](EXAMPLE, tmp_path / "model")
    assert open_checkpoint(tmp_path / "model").config == open_checkpoint(EXAMPLE).config
    errors = []
    for folder in (EXAMPLE, tmp_path / "model"):
        tensors = load_file(folder / "model.safetensors")
        weight = tensors["model.layers.0.mlp.up_proj.weight"].float()
        rounded = dequantize(quantize(weight, SCHEMES["W4A16"]), torch.float32)
        # as the layer sees it: inputs have the size of the norm's weights
        norm = tensors["model.layers.0.post_attention_layernorm.weight"].float()
        errors.append(float(((rounded - weight) * norm).square().sum()))
    assert errors[1] > 1.3 * errors[0]
