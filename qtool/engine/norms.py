"""The norms of decoder layers, each with the addition before it and the rounding after it in one
launch (`add_norm`); and how what replaces a part of a model is compared with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeGuard

import torch
from torch import Tensor, nn

from qtool.engine import native_elementwise
from qtool.engine.norm_kind import NO_KIND, NormKind
from qtool.runtime.kernels import current
from qtool.runtime.kernels.scaled_mm import rounded_rows
from qtool.runtime.linear import QuantizedLinear
from qtool.scheme import Activations

Codes = Literal["fp8", "int8"]
# the kinds of norms that are tried: plus_one, late, centered
KINDS = (
    (False, False, False),
    (True, True, False),
    (False, True, False),
    (True, False, False),
    (False, True, True),
)
# The largest relative error of a part that replaces another.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
# The same where quantized layers round inputs: codes move at the least difference.
ROUNDED_TOLERANCE = 0.1


def tolerance_of(module: nn.Module, dtype: torch.dtype) -> float:
    """Return the largest relative error of what replaces ``module``, in ``dtype``."""
    is_rounded = any(isinstance(each, QuantizedLinear) for each in module.modules())
    return ROUNDED_TOLERANCE if is_rounded else TOLERANCE[dtype]


class NotFused(Exception):
    """Why a model stays as it is."""


@dataclass
class Sum:
    """Hidden states that are still to be added, ``residual + other + factor * after(x)``."""

    x: Tensor
    """The last output of a layer, [T, H]."""
    residual: Tensor | None = None
    """The hidden states before it, [T, H]; None: ``x`` is whole."""
    after: Norm | None = None
    """The norm of the output."""
    factor: float = 1.0
    """What the output is multiplied with."""
    other: Tensor | None = None
    """The output of a part that ran beside the last, [T, H]."""

    @classmethod
    def of(cls, states: Tensor | Sum) -> Sum:
        """Return hidden states, [1, T, H] if they are whole, as one."""
        return states if isinstance(states, Sum) else cls(states.flatten(0, -2))

    def total(self) -> Tensor:
        """Return the hidden states, [T, H]."""
        x = self.x if self.after is None else self.after.normalize(self.x)
        x = x if self.factor == 1 else x * self.factor
        if self.residual is None:
            return x
        return (self.residual if self.other is None else self.residual + self.other) + x


class Norm(nn.Module):
    """A norm of any model: ``weight`` and ``bias`` are of its size, [H]; [heads, D] for a norm over
    each head with weights of its own.
    """

    def __init__(
        self, weight: nn.Parameter, kind: NormKind, bias: nn.Parameter | None = None
    ) -> None:
        super().__init__()
        self.weight = weight
        self.kind = kind
        self.bias = bias

    @property
    def weights(self) -> tuple[Tensor, Tensor | None]:
        """The weight and the bias."""
        return self.weight, self.bias

    @classmethod
    def of(cls, module: nn.Module) -> Norm:
        """Return ``module`` as a norm of the kind that it is seen to be.

        Raises: NotFused, when it is of none.
        """
        if isinstance(module, Norm):
            return module
        name = type(module).__name__
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if not _is_parameter(weight) or not isinstance(eps, float):
            raise NotFused(f"{name} is not a norm of one weight")
        if bias is not None and not _is_parameter(bias):
            raise NotFused(f"{name} has a bias of another kind")
        sizes = torch.tensor([1e-3, 0.1, 1, 10], dtype=weight.dtype, device=weight.device)
        # the mean is not 0, which some subtract
        x = random_input((4, *weight.shape), weight) + 0.5
        x = x * sizes.view(-1, *[1] * weight.dim())
        expected = module(x)
        norms = [cls(weight, NormKind(eps, *kind), bias) for kind in KINDS]
        errors = [distance(norm.normalize(x), expected, expected) for norm in norms]
        best = min(range(len(norms)), key=errors.__getitem__)
        if expected.dtype != x.dtype or not errors[best] <= TOLERANCE[x.dtype]:
            raise NotFused(
                f"{name} is not a known kind of norm (relative error {errors[best]:.1e})"
            )
        return norms[best]

    def forward(self, x: Tensor | Sum) -> Tensor:
        """Return the norm, [1, T, H], of the hidden states."""
        with current(self.weight.device):
            normed, _, _ = add_norm(Sum.of(x), self)
        return normed[None]

    def normalize(self, x: Tensor) -> Tensor:
        """Return the norm of ``x``, of its shape and dtype, over the last dimension."""
        eps, plus_one, late, centered = self.kind
        wide, weight = x.float(), self.weight.float()
        if centered:
            wide = wide - wide.mean(-1, keepdim=True)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        if not late:
            wide = wide.to(x.dtype).float()
        wide = wide * (1 + weight if plus_one else weight)
        return (wide if self.bias is None else wide + self.bias.float()).to(x.dtype)


def add_norm(
    states: Sum, norm: Norm | None, codes: Codes | None = None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the norm of hidden states, [T, H], or its codes and their scales, f32 [T, 1]; and the
    hidden states.

    ``norm``: None stands for the hidden states themselves.
    """
    if norm is None and states.residual is None:
        return states.x, None, states.x
    if states.x.is_cuda:
        return _launch_add_norm(states, norm, codes)
    if native := _native_add_norm(states, norm):
        normed, total = native
        return *rounded(normed, codes), total
    total = states.total()
    return *rounded(total if norm is None else norm.normalize(total), codes), total


def _native_add_norm(states: Sum, norm: Norm | None) -> tuple[Tensor, Tensor] | None:
    """Return the norm of hidden states and the hidden states, both [T, H], by native_elementwise.c;
    None where it does not take them.
    """
    after = states.after
    if states.residual is None and (after or states.factor != 1):
        return None
    weights = norm.weights if norm else None
    after_weights = after.weights if after else None
    tensors = states.x, states.residual, states.other, *(weights or ()), *(after_weights or ())
    if not native_elementwise.applies(*tensors):
        return None
    return native_elementwise.add_norm(
        states.x,
        states.residual,
        weights,
        norm.kind if norm else None,
        after=after_weights,
        after_kind=after.kind if after else None,
        factor=states.factor,
        other=states.other,
    )


def _launch_add_norm(
    states: Sum, norm: Norm | None, codes: Codes | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return what `add_norm` does, by a kernel."""
    from qtool.engine import elementwise

    x, after = states.x, states.after
    if norm and after and norm.kind != after.kind:  # a launch more
        x = after(x)[0]
        after = None
    kind = next((each.kind for each in (norm, after) if each), NO_KIND)
    return elementwise.add_norm(
        x.contiguous(),
        states.residual,
        None if norm is None else norm.weights,
        *kind,
        after=None if after is None else after.weights,
        factor=states.factor,
        other=states.other,
        codes=codes,
    )


def rounded(x: Tensor, codes: Codes | None) -> tuple[Tensor, Tensor | None]:
    """Return ``x`` [T, K], or its codes and their scales, f32 [T, 1]."""
    return rounded_rows(x, Activations(codes, "token")) if codes else (x, None)


def _is_parameter(tensor: object) -> TypeGuard[nn.Parameter]:
    return isinstance(tensor, nn.Parameter) and tensor.dim() in (1, 2)


def random_input(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return normal random numbers, the same each time, with the dtype and device of ``like``."""
    generator = torch.Generator(like.device).manual_seed(0)
    return torch.randn(shape, generator=generator, device=like.device).to(like.dtype)


def distance(result: Tensor, expected: Tensor, reference: Tensor) -> float:
    """Return how far ``result`` is from ``expected``, relative to the norm of ``reference``; NaN
    counts as far.
    """
    size = float(reference.double().norm())
    return float((result.double() - expected.double()).norm()) / (size or 1.0)
