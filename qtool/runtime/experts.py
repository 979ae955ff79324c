"""`ExpertStack`: the layers of all experts, where transformers keeps one 3D weight; `ExpertStacks`
collects them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from qtool.name_map import LinearWeight
from qtool.runtime.causal_lm import CausalLM

T = TypeVar("T")


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


class ExpertStacks:
    """Collects the layers of experts until each stack is complete."""

    def __init__(self) -> None:
        # (module, parameter) -> number of the expert -> (part, layer)
        self._stacks: dict[tuple[str, str], dict[int, list[tuple[int, nn.Module]]]] = {}
        self._interleaved: set[tuple[str, str]] = set()

    def add(self, place: LinearWeight, layer: nn.Module) -> None:
        """Note the layer that goes to ``place``."""
        stack = (place.module, place.parameter)
        experts = self._stacks.setdefault(stack, {})
        experts.setdefault(place.expert or 0, []).append((place.part, layer))
        if place.is_interleaved:
            self._interleaved.add(stack)

    def install(self, model: CausalLM) -> None:
        """Replace the parameters of ``model`` that hold experts."""
        for (holder, parameter), experts in self._stacks.items():
            layers = [in_order(experts[number]) for number in sorted(experts)]
            stack = ExpertStack(layers, is_interleaved=(holder, parameter) in self._interleaved)
            setattr(model.get_submodule(holder), parameter, stack)


def stacked_biases(
    layers: Iterable[tuple[str, LinearWeight]],
    read: Callable[[str], Tensor],
    present: Collection[str],
) -> dict[str, Tensor]:
    """Return the biases of experts that lie apart, as the parameters of the model that stack them.

    Args:
        layers: names and places of layers.
        read: returns a tensor of the checkpoint.
        present: the names of its tensors.
    """
    found: dict[str, dict[int, list[tuple[int, Tensor]]]] = {}
    interleaved = {}
    for name, place in layers:
        bias = f"{name}.bias"
        if place.expert is not None and not place.is_stacked and bias in present:
            parameter = f"{place.module}.{place.parameter}_bias"
            interleaved[parameter] = place.is_interleaved
            experts = found.setdefault(parameter, {})
            experts.setdefault(place.expert, []).append((place.part, read(bias)))
    return {
        parameter: torch.stack(
            [
                side_by_side(in_order(experts[number]), is_interleaved=interleaved[parameter])
                for number in sorted(experts)
            ]
        )
        for parameter, experts in found.items()
    }


def in_order(parts: Sequence[tuple[int, T]]) -> list[T]:
    """Return the parts of an expert, given with their positions, in order."""
    return [each for _, each in sorted(parts, key=lambda part: part[0])]


def side_by_side(parts: Sequence[Tensor], *, is_interleaved: bool) -> Tensor:
    """Return the outputs [..., N] of several layers as those of one: one after another, or
    alternating.
    """
    if len(parts) == 1:
        return parts[0]
    return torch.stack([*parts], dim=-1).flatten(-2) if is_interleaved else torch.cat([*parts], -1)


_PRODUCTS = (nn.functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__)
_BATCHED_PRODUCTS = (torch.bmm, torch.matmul, Tensor.bmm, Tensor.matmul, Tensor.__matmul__)
