"""`ExpertStack`: the quantized layers of all experts, where transformers keeps one 3D weight."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn


class ExpertStack(nn.Module):
    """Replaces a parameter [experts, ...]: ``stack[e]`` is a weight for ``linear`` and ``@``.

    Args:
        experts: for each expert, the layers whose outputs, side by side, are those of its weight.
    """

    def __init__(self, experts: Sequence[Sequence[nn.Module]]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.ModuleList(parts) for parts in experts)

    def __getitem__(self, index: int | Tensor) -> ExpertWeight:
        return ExpertWeight(list(self.experts[int(index)].children()))


class ExpertWeight:
    """The weight of one expert, for ``functional.linear(x, weight)`` and ``x @ weight``."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        self._parts = parts

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
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return y if bias is None else y + cast(Tensor, bias)


_PRODUCTS = (nn.functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__)
