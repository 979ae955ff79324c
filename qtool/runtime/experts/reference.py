"""The definition of a layer of experts: the tokens of each go through the reference kernel.

It supports every layer; the other kernels are tested against it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from qtool.runtime.experts.grouped import ExpertsSpec, ExpertWeights
from qtool.runtime.experts.packing import part
from qtool.runtime.experts.routing import SharedExpert, add_shared
from qtool.runtime.kernels import Device, LinearSpec
from qtool.runtime.kernels import reference as linear


def unsupported_reason(spec: ExpertsSpec, device: Device) -> str | None:
    """Support every layer."""
    return None


def pack(spec: ExpertsSpec, weights: ExpertWeights) -> dict[str, Tensor]:
    """Keep the tensors of each expert as they are, under its number."""
    packed = {}
    for name, of, parts in (("up", spec.up, weights.up), ("down", spec.down, weights.down)):
        for expert, weight in enumerate(parts):
            for key, tensor in linear.pack(of, weight).items():
                packed[f"{name}_{expert}_{key}"] = tensor
    biases = {"up_bias": weights.up_bias, "down_bias": weights.down_bias}
    return packed | {name: bias for name, bias in biases.items() if bias is not None}


def apply(
    spec: ExpertsSpec,
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    packed: Mapping[str, Tensor],
    shared: SharedExpert | None = None,
) -> Tensor:
    """Multiply the tokens of each expert, and add up in f32."""
    total = x.new_zeros(x.shape[0], spec.down.shape[0], dtype=torch.float32)
    for expert in range(spec.count):
        tokens, choices = (experts == expert).nonzero(as_tuple=True)
        if len(tokens):
            inner = spec.gate.own(_product(spec.up, "up", expert, x[tokens], packed))
            y = _product(spec.down, "down", expert, inner, packed)
            total.index_add_(0, tokens, y.float() * weights[tokens, choices, None].float())
    return add_shared(total, shared).to(x.dtype)


def _product(
    spec: LinearSpec, name: str, expert: int, x: Tensor, packed: Mapping[str, Tensor]
) -> Tensor:
    tensors = part(packed, f"{name}_{expert}")
    bias = packed.get(f"{name}_bias")
    of_expert = None if bias is None else bias[expert].to(x.dtype)
    return linear.apply(replace(spec, dtype=x.dtype), x, tensors, of_expert)
