"""`QuantizedLinear`: a linear layer packed for its kernel; and layers fused into one of these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qtool.runtime.kernels import (
    Call,
    Choice,
    LinearSpec,
    codes_taken,
    linear,
    load_kernel,
    number_of,
)
from qtool.runtime.packed import PackedModule
from qtool.scheme import Scheme
from qtool.weight import QuantizedWeight


class QuantizedLinear(PackedModule):
    """``y = x W^T + bias`` with ``W`` packed for one or two kernels.

    Whatever the weight requires of its input is applied first: ``x[:, perm]`` for act-order,
    ``x * pre_scale``. The kernel rounds the input, unless the layer before it has already rounded
    to what this layer ``takes_codes`` of.
    """

    perm: Tensor | None
    pre_scale: Tensor | None
    bias: Tensor | None

    def __init__(
        self, spec: LinearSpec, choice: Choice, weight: QuantizedWeight, bias: Tensor | None = None
    ) -> None:
        super().__init__()
        self.spec = spec
        self.choice = choice
        self.out_features, self.in_features = spec.shape
        kernels = self._pack(replace(weight, perm=None, pre_scale=None))
        self._names = [f"{kernel}_{name}" for kernel, _, names in kernels for name in names]
        self.register_buffer("perm", weight.perm, persistent=False)
        self.register_buffer("pre_scale", _pre_scale(weight, spec.dtype), persistent=False)
        self.register_buffer(
            "bias", None if bias is None else bias.to(spec.dtype), persistent=False
        )
        changes_input = weight.perm is not None or weight.pre_scale is not None
        self.takes_codes = None if changes_input else codes_taken(spec, choice)
        self._call = number_of(Call(spec, kernels))

    def _pack(self, weight: QuantizedWeight) -> tuple[tuple[str, int | None, tuple[str, ...]], ...]:
        """Register the tensors of each kernel as buffers; return what `Call` says of them."""
        few = self.choice.few
        kernels: list[tuple[str, int | None]] = [(few.kernel, few.most)] if few else []
        calls = []
        for kernel, most in [*kernels, (self.choice.kernel, None)]:
            packed = load_kernel(kernel).pack(self.spec, weight)
            calls.append((kernel, most, tuple(packed)))
            for name, tensor in packed.items():
                self.register_packed(f"{kernel}_{name}", tensor)
        return tuple(calls)

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """The scheme of its matrix."""
        return (self.spec.scheme,)

    @property
    def weight(self) -> Tensor:
        """A tensor without elements: some models (T5) ask the weight of a layer for its dtype."""
        packed = self._buffers[self._names[0]]
        device = None if packed is None else packed.device
        return torch.empty(0, dtype=self.spec.dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply ``x`` [..., K]; the result is [..., N] of its dtype."""
        if x.dim() == 2 and x.dtype == self.spec.dtype:
            return self._multiply(x) if x.shape[0] else x.new_empty(0, self.out_features)
        rows = x.reshape(-1, self.in_features).to(self.spec.dtype)
        if not rows.shape[0]:
            return x.new_empty(*x.shape[:-1], self.out_features)
        return self._multiply(rows).to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def _multiply(self, rows: Tensor) -> Tensor:
        if self.perm is not None:
            rows = rows.index_select(1, self.perm)
        if self.pre_scale is not None:
            rows = rows * self.pre_scale
        return linear(rows.contiguous(), self._packed(), self.bias, self._call)

    def multiply_codes(self, codes: Tensor, row_scale: Tensor) -> Tensor:
        """Multiply an input that is already rounded to ``takes_codes``; the result is [T, N].

        Args:
            codes: the rounded input, [T, K].
            row_scale: the scale of each token, f32 [T, 1].
        """
        return linear(codes, self._packed(), self.bias, self._call, row_scale)

    def _packed(self) -> list[Tensor | None]:
        # `get_buffer` looks for submodules first, at every step
        return [self._buffers[name] for name in self._names]

    def extra_repr(self) -> str:
        """Show shape, scheme and kernel in the printed model."""
        return f"{self.in_features} -> {self.out_features}, {self.spec.scheme.name}, {self.choice}"


def _pre_scale(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor | None:
    """Return the ``pre_scale`` of ``weight`` in the order of the permuted inputs."""
    if weight.pre_scale is None:
        return None
    pre_scale = weight.pre_scale.to(dtype)
    return pre_scale if weight.perm is None else pre_scale[weight.perm.long()]


class _Outputs(NamedTuple):
    """What one product gave to the layers that share it."""

    x: Tensor
    version: int
    """How often ``x`` was written to before."""
    parts: tuple[Tensor | None, ...]
    """The outputs of each layer; None for those that are already taken."""


class SharedInput:
    """Fused layers: the first that is called multiplies for all, and each takes its outputs.

    The outputs that still wait are one object that is replaced and never changed, so that threads
    cannot get each other's.
    """

    def __init__(self, whole: QuantizedLinear, sizes: Sequence[int]) -> None:
        self.whole = whole
        self.sizes = tuple(sizes)
        self._waiting: _Outputs | None = None

    def take(self, x: Tensor, index: int) -> Tensor:
        """Return the outputs of layer ``index`` for ``x``."""
        version = 0 if torch.compiler.is_compiling() or x.is_inference() else x._version
        parts = self._parts_for(x, version)
        if parts is None or parts[index] is None:
            parts = self.whole(x).split(self.sizes, dim=-1)
        part = parts[index]
        assert part is not None
        left = (*parts[:index], None, *parts[index + 1 :])
        # nothing outlives its last use
        wanted = any(other is not None for other in left)
        self._waiting = _Outputs(x, version, left) if wanted else None
        return part

    def _parts_for(self, x: Tensor, version: int) -> tuple[Tensor | None, ...] | None:
        waiting = self._waiting
        if waiting is None or waiting.x is not x or waiting.version != version:
            return None
        return waiting.parts


class FusedLinear(nn.Module):
    """One of the layers that share a `QuantizedLinear`; the first of them owns it."""

    def __init__(self, shared: SharedInput, index: int) -> None:
        super().__init__()
        self.shared = shared
        self.index = index
        self.in_features = shared.whole.in_features
        self.out_features = shared.sizes[index]
        if index == 0:
            self.whole = shared.whole

    def forward(self, x: Tensor) -> Tensor:
        """Multiply ``x`` [..., K]; the result is [..., N]."""
        return self.shared.take(x, self.index)
