"""One quantized linear layer: packed tensors and the kernel that multiplies with them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from qtool.runtime.kernels import Call, Choice, LinearSpec, load_kernel, number_of
from qtool.weight import QuantizedWeight


class QuantizedLinear(nn.Module):
    """``y = x W^T + bias`` with ``W`` as some kernel keeps it.

    What the weight asks of its input comes first: ``x[:, perm]`` for act-order, then ``x * pre_scale``; rounding it is the kernel's affair.
    """

    perm: Tensor | None
    pre_scale: Tensor | None
    bias: Tensor | None

    def __init__(self, spec: LinearSpec, choice: Choice, weight: QuantizedWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.spec, self.choice = spec, choice
        self.out_features, self.in_features = spec.shape
        packed = load_kernel(choice.kernel).pack(spec, replace(weight, perm=None, pre_scale=None))
        self._names = tuple(packed)
        for name, tensor in packed.items():
            self.register_buffer(name, tensor, persistent=False)
        pre_scale = None if weight.pre_scale is None else weight.pre_scale.to(spec.dtype)
        if pre_scale is not None and weight.perm is not None:
            pre_scale = pre_scale[weight.perm.long()]
        self.register_buffer("perm", weight.perm, persistent=False)
        self.register_buffer("pre_scale", pre_scale, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.to(spec.dtype), persistent=False)
        self._call = number_of(Call(choice.kernel, spec, self._names))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply ``x`` [..., K]; the result is [..., N] of its dtype."""
        rows = x.reshape(-1, self.in_features)
        if not rows.shape[0]:
            return x.new_empty(*x.shape[:-1], self.out_features)
        if self.perm is not None:
            rows = rows.index_select(1, self.perm)
        if self.pre_scale is not None:
            rows = rows * self.pre_scale
        packed = [self.get_buffer(name) for name in self._names]
        y: Tensor = torch.ops.qtool.linear(rows.contiguous(), packed, self.bias, self._call)
        return y.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Show shape, scheme and kernel in the printed model."""
        return f"{self.in_features} -> {self.out_features}, {self.spec.scheme.name}, {self.choice.kernel}"
