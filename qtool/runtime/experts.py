"""A stack of experts, each of quantized linear layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class ExpertStack(nn.Module):
    """Stands where transformers keeps the weights of all experts in one tensor: ``stack[e]`` is
    what ``linear`` and ``@`` multiply with.

    ``experts``: for each the layers whose outputs, side by side, are those of its weight.
    """

    def __init__(self, experts: Sequence[Sequence[nn.Module]]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.ModuleList(parts) for parts in experts)

    def __getitem__(self, index: int | Tensor) -> ExpertWeight:
        return ExpertWeight(list(self.experts[int(index)].children()))


class ExpertWeight:
    """The weight of one expert, for ``torch.nn.functional.linear(x, weight)`` and ``x @
    weight``.
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        self._parts = parts

    @classmethod
    def __torch_function__(
        cls,
        function: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Multiply, when that is what torch was asked for."""
        if function not in _PRODUCTS or not isinstance(args[1], cls):
            return NotImplemented
        x, weight, *rest = args
        outputs = [part(x) for part in weight._parts]
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        bias = rest[0] if rest else (kwargs or {}).get("bias")
        return y if bias is None else y + bias


_PRODUCTS = (nn.functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__)
