"""The weights of all experts as one, in the order that kernels want."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from qtool.runtime.experts.gates import Gate
from qtool.runtime.join import interleave, join
from qtool.scheme import Activations
from qtool.weight import QuantizedWeight


def stack(weights: list[QuantizedWeight], gate: Gate | None = None) -> QuantizedWeight:
    """Return the weights of all experts as one with their outputs one after another; empties
    ``weights``.

    With a ``gate``, gate and up of each expert come by turns.
    """
    if gate and not gate.is_interleaved:
        for index, weight in enumerate(weights):
            weights[index] = interleave(weight)
    whole = join([replace(weight, activation=None) for weight in weights])
    weights.clear()
    return whole


def stack_bias(bias: Tensor | None, gate: Gate | None = None) -> Tensor | None:
    """Return the biases [experts, N] in the order of `stack`, [experts * N]."""
    if bias is None:
        return None
    if gate and not gate.is_interleaved:
        bias = torch.stack(bias.chunk(2, dim=1), dim=2)
    return bias.reshape(-1).contiguous()


def input_scales(weights: list[QuantizedWeight]) -> Tensor | None:
    """Return the calibrated input scale of each expert, f32 [experts], or [1] if all are the same;
    None if there are none.
    """
    activations = (weight.activation for weight in weights)
    scales = [part.scale for part in activations if part and part.scale is not None]
    if not scales:
        return None
    each = torch.stack([scale.float().reshape(()) for scale in scales])
    return each[:1].clone() if bool((each == each[0]).all()) else each


def scales_of_rows(scales: Tensor | None, experts: Tensor, inputs: Activations) -> Tensor | None:
    """Return calibrated input scales in the shape that rows [rows, K] are divided by.

    Args:
        scales: from `input_scales`.
        experts: of each row, [rows].
        inputs: how rows are rounded.
    """
    if scales is None or scales.numel() == 1:
        return scales
    return scales[experts].reshape((-1, 1, 1) if inputs.granularity == "group" else (-1, 1))


def unsupported_inputs(inputs: Activations | None) -> str | None:
    """Return why the rows of all experts cannot be rounded together by `fake_quantize_input`."""
    if inputs and inputs.granularity == "tensor" and inputs.dynamic:
        return f"it does not find one input scale for all tokens ({inputs})"
    if inputs and not inputs.symmetric and not inputs.dynamic:
        return f"it has no calibrated zero points of inputs ({inputs})"
    return None


def part(packed: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the tensors of ``packed`` with ``name`` and an underscore before their own names."""
    start = f"{name}_"
    return {key[len(start) :]: value for key, value in packed.items() if key.startswith(start)}
