"""One quantized linear layer: packed tensors and the kernel that multiplies with them; several that
share an input.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qtool.errors import UsageError
from qtool.runtime.kernels import Call, Choice, LinearSpec, codes_taken, load_kernel, number_of
from qtool.weight import QuantizedWeight


class QuantizedLinear(nn.Module):
    """``y = x W^T + bias`` with ``W`` as some kernel keeps it.

    What the weight asks of its input comes first: ``x[:, perm]`` for act-order, ``x * pre_scale``.
    Rounding the input is the kernel's affair, unless it ``takes_codes`` that the layer before has
    rounded to.
    """

    perm: Tensor | None
    pre_scale: Tensor | None
    bias: Tensor | None

    def __init__(
        self, spec: LinearSpec, choice: Choice, weight: QuantizedWeight, bias: Tensor | None = None
    ) -> None:
        super().__init__()
        self.spec, self.choice = spec, choice
        self.out_features, self.in_features = spec.shape
        kernels = [(choice.few.kernel, choice.few.most)] if choice.few else []
        parts: list[tuple[str, int | None, tuple[str, ...]]] = []
        for kernel, most in [*kernels, (choice.kernel, None)]:
            packed = load_kernel(kernel).pack(spec, replace(weight, perm=None, pre_scale=None))
            parts.append((kernel, most, tuple(packed)))
            for name, tensor in packed.items():
                self.register_buffer(f"{kernel}_{name}", tensor, persistent=False)
        self._names = [f"{kernel}_{name}" for kernel, _, names in parts for name in names]
        pre_scale = None if weight.pre_scale is None else weight.pre_scale.to(spec.dtype)
        if pre_scale is not None and weight.perm is not None:
            pre_scale = pre_scale[weight.perm.long()]
        self.register_buffer("perm", weight.perm, persistent=False)
        self.register_buffer("pre_scale", pre_scale, persistent=False)
        self.register_buffer(
            "bias", None if bias is None else bias.to(spec.dtype), persistent=False
        )
        self.takes_codes = (
            codes_taken(spec, choice) if weight.perm is None and weight.pre_scale is None else None
        )
        self._call = number_of(Call(spec, tuple(parts)))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply ``x`` [..., K]; the result is [..., N] of its dtype."""
        rows = x.reshape(-1, self.in_features).to(self.spec.dtype)
        if not rows.shape[0]:
            return x.new_empty(*x.shape[:-1], self.out_features)
        if self.perm is not None:
            rows = rows.index_select(1, self.perm)
        if self.pre_scale is not None:
            rows = rows * self.pre_scale
        y: Tensor = torch.ops.qtool.linear(rows.contiguous(), self._packed(), self.bias, self._call)
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def multiply_codes(self, codes: Tensor, row_scale: Tensor) -> Tensor:
        """Multiply what is rounded to ``takes_codes`` already, ``codes`` [T, K] with ``row_scale``,
        f32 [T, 1]; the result is [T, N].
        """
        y: Tensor = torch.ops.qtool.linear(codes, self._packed(), self.bias, self._call, row_scale)
        return y

    def _packed(self) -> list[Tensor | None]:
        # `get_buffer` looks for submodules first, at every step
        return [self._buffers[name] for name in self._names]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Follow to another device of the kind; no dtype changes, since codes and scales are no
        numbers to be cast.
        """
        for name, tensor in self.named_buffers(recurse=False):
            device = fn(torch.empty(0, dtype=torch.uint8, device=tensor.device)).device
            if device.type != tensor.device.type:
                hint = f"load it with device=`{device}`"
                raise UsageError(
                    "E_PACKED",
                    f"the weights are packed for {tensor.device.type}, and cannot move to {device}",
                    hint=hint,
                )
            if device != tensor.device:
                self._buffers[name] = tensor.to(device)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedLinear:
        """Share the weights, which nothing changes."""
        twin = copy.copy(self)
        twin._buffers = dict(self._buffers)
        return twin

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        hint = "`qtool export` converts the checkpoint it was loaded from"
        raise UsageError(
            "E_PACKED",
            "the weights are packed for a kernel, and a model of them cannot be saved",
            hint=hint,
        )

    def extra_repr(self) -> str:
        """Show shape, scheme and kernel in the printed model."""
        return f"{self.in_features} -> {self.out_features}, {self.spec.scheme.name}, {self.choice}"


class SharedInput:
    """Layers that multiply one input, fused: the first that is called computes for all, and each
    takes its part of the outputs.

    What waits to be taken is one object that is replaced and never changed, so that threads cannot
    get each other's outputs.
    """

    def __init__(self, whole: QuantizedLinear, sizes: Sequence[int]) -> None:
        self.whole, self.sizes = whole, tuple(sizes)
        self._waiting: tuple[Tensor, int, tuple[Tensor | None, ...]] | None = (
            None  # the input, how often it was written to, the outputs
        )

    def take(self, x: Tensor, index: int) -> Tensor:
        """Return what layer ``index`` makes of ``x``."""
        version = 0 if torch.compiler.is_compiling() or x.is_inference() else x._version
        waiting = self._waiting
        parts = waiting[2] if waiting and waiting[0] is x and waiting[1] == version else None
        if parts is None or parts[index] is None:
            parts = self.whole(x).split(self.sizes, dim=-1)
        part = parts[index]
        assert part is not None
        left = tuple(None if i == index else other for i, other in enumerate(parts))
        # nothing outlives its last use
        self._waiting = (x, version, left) if any(other is not None for other in left) else None
        return part


class FusedLinear(nn.Module):
    """One of the layers that share a `QuantizedLinear`; the first of them owns it."""

    def __init__(self, shared: SharedInput, index: int) -> None:
        super().__init__()
        self.shared, self.index = shared, index
        self.in_features, self.out_features = shared.whole.in_features, shared.sizes[index]
        if index == 0:
            self.whole = shared.whole

    def forward(self, x: Tensor) -> Tensor:
        """Multiply ``x`` [..., K]; the result is [..., N]."""
        return self.shared.take(x, self.index)
