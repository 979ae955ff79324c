"""What an expert does between its two products: the activation, and the product of gate and up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Kind = Literal["swiglu", "gelu_tanh", "other"]


@dataclass(frozen=True)
class Gate:
    """``activation(gate) * (up + offset)`` of the outputs [..., 2 N] of gate and up.

    ``swiglu`` is ``gate * sigmoid(alpha * gate)``, ``gelu_tanh`` the approximation of GELU, and
    ``other`` what the model's own code does.
    """

    kind: Kind
    own: Callable[[Tensor], Tensor] = field(compare=False)
    """The model's own code: [..., 2 N] to [..., N]; [..., N] where experts have no gate."""
    is_interleaved: bool = False
    """Whether the outputs of gate and up alternate; otherwise all of gate come first."""
    alpha: float = 1.0
    limit: float | None = None
    """The largest gate, and the largest magnitude of up."""
    offset: float = 0.0

    @property
    def constants(self) -> tuple[Kind, float, float | None, float]:
        """What a kernel is compiled for."""
        return self.kind, self.alpha, self.limit, self.offset

    def apply(self, gate_up: Tensor) -> Tensor:
        """Return the input of the second product, [..., N]."""
        if self.is_interleaved:
            gate, up = gate_up[..., ::2], gate_up[..., 1::2]
        else:
            gate, up = gate_up.chunk(2, dim=-1)
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        if self.kind == "gelu_tanh":
            return functional.gelu(gate, approximate="tanh") * up
        return gate * torch.sigmoid(gate * self.alpha) * (up + self.offset)


def gate_of(experts: nn.Module) -> Gate:
    """Return what ``experts``, a module of transformers' experts interface, does between its
    products, as seen from numbers.
    """
    if not getattr(experts, "has_gate", True):
        return Gate("other", experts.get_submodule("act_fn"))
    own: Callable[[Tensor], Tensor] = experts._apply_gate  # type: ignore[assignment]
    x = torch.randn(256, generator=torch.Generator().manual_seed(0)) * 6
    seen = own(x)
    for gate in _candidates(experts, own):
        found = gate.apply(x)
        if seen.shape == found.shape and torch.allclose(seen, found, rtol=1e-5, atol=1e-5):
            return gate
    return Gate("other", own)


def _candidates(experts: nn.Module, own: Callable[[Tensor], Tensor]) -> Iterator[Gate]:
    limits = {None, *(float_attribute(experts, name) for name in ("limit", "swiglu_limit"))}
    alphas = {1.0, float_attribute(experts, "alpha") or 1.0}
    for is_interleaved in (False, True):
        yield Gate("gelu_tanh", own, is_interleaved)
        for limit in limits:
            for alpha in alphas:
                for offset in (0.0, 1.0):
                    yield Gate("swiglu", own, is_interleaved, alpha, limit, offset)


def float_attribute(module: nn.Module, name: str) -> float | None:
    """Return the number that ``module`` calls ``name``, None if it has none."""
    value = getattr(module, name, None)
    return float(value) if isinstance(value, int | float) else None
