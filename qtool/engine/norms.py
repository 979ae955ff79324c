"""The norms of decoder layers, each with the addition before it and the rounding after it in one
launch; and how what replaces a part of a model is compared with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from qtool.runtime.kernels import current
from qtool.runtime.kernels.scaled_mm import rounded_rows
from qtool.scheme import Activations

Codes = Literal["fp8", "int8"]
# The largest relative error of a part that replaces another.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


class NotFused(Exception):
    """Why a model stays as it is."""


@dataclass
class Sum:
    """Hidden states that are still to be added: two tensors [T, H]."""

    x: Tensor
    residual: Tensor

    def total(self) -> Tensor:
        """Return the hidden states, [T, H]."""
        return self.residual + self.x


class RMSNorm(nn.Module):
    """A norm of any model that divides by the root of the mean of squares.

    ``plus_one``: the weight is what is added to 1, as Gemma has it. ``late``: the norm is rounded
        only after it is multiplied by the weight.
    """

    def __init__(self, weight: nn.Parameter, eps: float, *, plus_one: bool, late: bool) -> None:
        super().__init__()
        self.weight, self.eps, self.plus_one, self.late = weight, eps, plus_one, late

    @property
    def kind(self) -> tuple[float, bool, bool]:
        """Everything but the weight."""
        return self.eps, self.plus_one, self.late

    @classmethod
    def of(cls, module: nn.Module) -> RMSNorm:
        """Return ``module`` as a norm of the kind that it is seen to be.

        Raises: NotFused, when it is of none.
        """
        if isinstance(module, RMSNorm):
            return module
        name = type(module).__name__
        weight = getattr(module, "weight", None)
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        is_vector = isinstance(weight, nn.Parameter) and weight.dim() == 1
        if not is_vector or not isinstance(eps, float) or getattr(module, "bias", None) is not None:
            raise NotFused(f"{name} is not an RMSNorm")
        weight = cast(nn.Parameter, weight)
        sizes = torch.tensor([[1e-3], [0.1], [1], [10]], device=weight.device)
        x = random_input((4, len(weight)), weight) * sizes.to(weight.dtype)
        expected = module(x)
        kinds = [
            cls(weight, eps, plus_one=plus_one, late=late)
            for plus_one, late in ((False, False), (True, True), (False, True), (True, False))
        ]
        errors = [distance(norm.normalize(x), expected, expected) for norm in kinds]
        best = min(range(len(kinds)), key=errors.__getitem__)
        if expected.dtype != x.dtype or not errors[best] <= TOLERANCE[x.dtype]:
            raise NotFused(
                f"{name} is not a known kind of RMSNorm (relative error {errors[best]:.1e})"
            )
        return kinds[best]

    def forward(self, x: Tensor | Sum) -> Tensor:
        """Return the norm, [1, T, H], of the hidden states."""
        with current(self.weight.device):
            normed, _, _ = self.add(*parts_of(x))
        return normed[None]

    def add(
        self, x: Tensor, residual: Tensor | None, codes: Codes | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return the norm of ``x + residual``, [T, H], or its codes and their scales, f32 [T, 1];
        and the sum.
        """
        if x.is_cuda:
            from qtool.engine import elementwise

            return elementwise.add_norm(
                x.contiguous(),
                residual,
                self.weight,
                self.eps,
                plus_one=self.plus_one,
                late=self.late,
                codes=codes,
            )
        total = x if residual is None else residual + x
        return *rounded(self.normalize(total), codes), total

    def normalize(self, x: Tensor) -> Tensor:
        """Return the norm of ``x``, of its shape and dtype, over the last dimension."""
        wide, weight = x.float(), self.weight.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        if not self.late:
            wide = wide.to(x.dtype).float()
        return (wide * (1 + weight if self.plus_one else weight)).to(x.dtype)


def rounded(x: Tensor, codes: Codes | None) -> tuple[Tensor, Tensor | None]:
    """Return ``x`` [T, K], or its codes and their scales, f32 [T, 1]."""
    return rounded_rows(x, Activations(codes, "token")) if codes else (x, None)


def parts_of(x: Tensor | Sum) -> tuple[Tensor, Tensor | None]:
    """Return the two parts of hidden states, [T, H]; those that are whole have no second."""
    return (x.x, x.residual) if isinstance(x, Sum) else (x.flatten(0, -2), None)


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
