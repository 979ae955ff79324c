"""Linear layers that share an input as one matmul, for decoder layers with few launches."""

from __future__ import annotations

from collections.abc import Sequence, Set
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor, nn

from qtool.engine.norms import Codes, NotFused
from qtool.runtime.linear import FusedLinear, QuantizedLinear

Linear = nn.Linear | QuantizedLinear | FusedLinear
PASSIVE = (nn.Dropout, nn.Identity)  # modules that do nothing when a model runs


class SideBySide(nn.Module):
    """Layers that share an input and cannot be one matmul."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of all, [T, N]."""
        return torch.cat([part(x) for part in self.parts], dim=-1)


def side_by_side(linears: Sequence[Linear], sizes: Sequence[int]) -> tuple[nn.Module, list[int]]:
    """Return one layer for ``linears``, which have one input, and where each of its parts, of
    ``sizes`` outputs, begins among its outputs.
    """
    starts = list(accumulate(sizes, initial=0))
    outputs = sum(linear.out_features for linear in linears)
    if outputs != starts[-1]:
        raise NotFused(f"{outputs} outputs instead of {starts[-1]}")
    if len(linears) == 1:
        return linears[0], starts[:-1]
    shared = [linear.shared for linear in linears if isinstance(linear, FusedLinear)]
    whole = shared[0] if shared else None
    if whole and shared == [whole] * len(linears) and len(whole.sizes) == len(linears):
        begins = list(accumulate(whole.sizes, initial=0))
        return whole.whole, [begins[cast(FusedLinear, linear).index] for linear in linears]
    dense = [linear for linear in linears if type(linear) is nn.Linear]
    if len(dense) == len(linears) and len({linear.weight.dtype for linear in dense}) == 1:
        return _joined(dense), starts[:-1]
    return SideBySide(linears), starts[:-1]


def _joined(linears: Sequence[nn.Linear]) -> nn.Linear:
    """Return one layer with the outputs of all; their weights become views of its own."""
    starts = list(accumulate((linear.out_features for linear in linears), initial=0))
    has_bias = any(linear.bias is not None for linear in linears)
    whole = nn.Linear(linears[0].in_features, starts[-1], bias=has_bias, device="meta")
    weights: list[Tensor] = [linear.weight for linear in linears]
    whole.weight = _parameter(torch.cat(weights))
    if has_bias:
        biases: list[Tensor] = [
            linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias
            for linear in linears
        ]
        whole.bias = _parameter(torch.cat(biases))
    for linear, start in zip(linears, starts, strict=False):
        part = slice(start, start + linear.out_features)
        linear.weight = _parameter(whole.weight[part])
        if linear.bias is not None:
            linear.bias = _parameter(whole.bias[part])
    return whole


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def codes_of(linear: nn.Module) -> Codes | None:
    """Return what the input of ``linear`` may be rounded to before it."""
    return linear.takes_codes if isinstance(linear, QuantizedLinear) else None


def multiply(linear: nn.Module, x: Tensor, scale: Tensor | None) -> Tensor:
    """Return ``linear`` of ``x`` [T, K], or of its codes and their scales."""
    if scale is not None:
        return cast(QuantizedLinear, linear).multiply_codes(x, scale)
    y: Tensor = linear(x)
    return y


def check_parts(module: nn.Module, needed: set[str], allowed: Set[str] = frozenset()) -> None:
    """Raises: NotFused, unless ``module`` has the parts ``needed``, and no other but those
    ``allowed`` and such as do nothing.
    """
    parts = {name for name, part in module.named_children() if not isinstance(part, PASSIVE)}
    own = {name for name, _ in module.named_parameters(recurse=False)}
    if wrong := sorted((needed - parts) | ((parts | own) - needed - allowed)):
        has = "no" if wrong[0] in needed else "a"
        raise NotFused(f"{type(module).__name__} has {has} `{wrong[0]}`")
