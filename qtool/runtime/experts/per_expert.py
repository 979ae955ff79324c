"""`ExpertStack`: the layers of all experts, where transformers keeps one 3D weight. The model's own
code calls them, one expert after another.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn


class ExpertStack(nn.Module):
    """Replaces a parameter [experts, ...]: ``stack[e]`` is a weight for ``linear`` and ``@``, the
    whole one for ``torch.bmm``.

    Args:
        experts: for each expert, the layers whose outputs make up those of its weight.
        is_interleaved: whether these outputs alternate, instead of lying side by side.
    """

    def __init__(
        self, experts: Sequence[Sequence[nn.Module]], *, is_interleaved: bool = False
    ) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.ModuleList(parts) for parts in experts)
        self.is_interleaved = is_interleaved

    @property
    def shape(self) -> tuple[int]:
        """The number of experts, as much of a weight's shape as models ask for."""
        return (len(self.experts),)

    def __getitem__(self, index: int | Tensor) -> ExpertWeight:
        parts = list(self.experts[int(index)].children())
        return ExpertWeight(parts, is_interleaved=self.is_interleaved)

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., object],
        types: Collection[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Multiply [E, T, K] with all experts, if ``function`` is such a product."""
        if function not in _BATCHED_PRODUCTS or not isinstance(stack := args[1], cls):
            return NotImplemented
        inputs = cast(Tensor, args[0])
        return torch.stack([x @ stack[number] for number, x in enumerate(inputs)])


class ExpertWeight:
    """The weight of one expert, for ``functional.linear(x, weight)`` and ``x @ weight``."""

    def __init__(self, parts: Sequence[nn.Module], *, is_interleaved: bool) -> None:
        self._parts = parts
        self._is_interleaved = is_interleaved

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., object],
        types: Collection[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Multiply, if ``function`` is a product with such a weight."""
        if function not in _PRODUCTS or not isinstance(weight := args[1], cls):
            return NotImplemented
        bias = args[2] if len(args) > 2 else (kwargs or {}).get("bias")
        outputs = [cast(Tensor, part(args[0])) for part in weight._parts]
        y = side_by_side(outputs, is_interleaved=weight._is_interleaved)
        return y if bias is None else y + cast(Tensor, bias)


def side_by_side(parts: Sequence[Tensor], *, is_interleaved: bool) -> Tensor:
    """Return the outputs [..., N] of several layers as those of one: one after another, or
    alternating.
    """
    if len(parts) == 1:
        return parts[0]
    return torch.stack([*parts], dim=-1).flatten(-2) if is_interleaved else torch.cat([*parts], -1)


_PRODUCTS = (nn.functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__)
_BATCHED_PRODUCTS = (torch.bmm, torch.matmul, Tensor.bmm, Tensor.matmul, Tensor.__matmul__)
