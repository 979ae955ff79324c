"""Weights of several layers as one, and one as several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qtool.weight import QuantizedWeight


def same_input(one: QuantizedWeight, other: QuantizedWeight) -> bool:
    """Whether two weights reorder, scale and round their input in the same way."""
    pairs = zip(_input_tensors(one), _input_tensors(other), strict=True)
    return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


def _input_tensors(weight: QuantizedWeight) -> tuple[Tensor | None, ...]:
    activation = weight.activation
    static = (activation.scale, activation.zero) if activation else (None, None)
    return weight.perm, weight.pre_scale, *static


def join(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Return weights that treat their input alike as one weight with all their outputs."""
    first = weights[0]
    if len(weights) == 1:
        return first
    dtypes = {weight.scale.dtype for weight in weights}
    dtype = first.scale.dtype if len(dtypes) == 1 else torch.float32
    return replace(
        first,
        data=torch.cat([weight.data for weight in weights]),
        scale=torch.cat([weight.scale.to(dtype) for weight in weights]),
        scale2=_cat_present([weight.scale2 for weight in weights]),
        zero=_cat_present([weight.zero for weight in weights]),
        offset=_cat_present([_as(dtype, weight.offset) for weight in weights]),
    )


def _as(dtype: torch.dtype, tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _cat_present(tensors: Sequence[Tensor | None]) -> Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(present) if present else None


def rows(weight: QuantizedWeight, start: int, stop: int) -> QuantizedWeight:
    """Return outputs ``start`` to ``stop`` of ``weight``, whose scales cover one row each."""
    return _each_row(weight, lambda part: part[start:stop])


def interleave(weight: QuantizedWeight) -> QuantizedWeight:
    """Return the outputs of the first and the second half of ``weight`` by turns; its scales cover
    one row each.
    """
    return _each_row(weight, lambda part: torch.stack(part.chunk(2), dim=1).flatten(0, 1))


def _each_row(weight: QuantizedWeight, take: Callable[[Tensor], Tensor]) -> QuantizedWeight:
    scale2, zero, offset = (
        part if part is None else take(part) for part in (weight.scale2, weight.zero, weight.offset)
    )
    return replace(
        weight,
        data=take(weight.data),
        scale=take(weight.scale),
        scale2=scale2,
        zero=zero,
        offset=offset,
    )


def scaled_by_row(weight: QuantizedWeight) -> QuantizedWeight:
    """Return ``weight`` with scales and zero points that cover one row each."""
    height = weight.tile[0]
    if height == 1:
        return weight
    outputs = weight.shape[0]

    def spread(part: Tensor) -> Tensor:
        return part.repeat_interleave(height, 0)[:outputs]

    zero = None if weight.zero is None else spread(weight.zero)
    block = None if weight.block is None else (1, weight.block[1])
    return replace(weight, scale=spread(weight.scale), zero=zero, block=block)
