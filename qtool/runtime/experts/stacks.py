"""`ExpertStacks`: puts the experts of a layer in the model as soon as all are there."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from qtool.name_map import LinearWeight
from qtool.runtime.causal_lm import CausalLM
from qtool.runtime.experts.grouped import ExpertsSpec, ExpertWeights, GroupedExperts
from qtool.runtime.experts.per_expert import ExpertStack, side_by_side
from qtool.runtime.experts.plan import DOWN, UP, GroupedPlan, slow_experts
from qtool.runtime.join import interleave, join, same_input, scaled_by_row
from qtool.runtime.kernels import choose, device_of
from qtool.runtime.linear import QuantizedLinear
from qtool.weight import QuantizedWeight

T = TypeVar("T")


@dataclass
class _Stack:
    """What a parameter of a model is made of."""

    experts: dict[int, list[tuple[int, nn.Module | QuantizedWeight]]] = field(default_factory=dict)
    """Of each expert, its parts with their positions."""
    is_interleaved: bool = False

    @property
    def count(self) -> int:
        """How many layers are there."""
        return sum(len(parts) for parts in self.experts.values())


class ExpertStacks:
    """Collects the layers of experts until each stack is complete.

    ``grouped``: by the name of a module of experts, how it is packed as a whole.
    """

    def __init__(self, grouped: Mapping[str, GroupedPlan] | None = None) -> None:
        self._grouped = grouped or {}
        # module -> parameter -> what it is made of
        self._holders: dict[str, dict[str, _Stack]] = {}
        self._complete: list[str] = []
        # why layers are not packed as a whole, as only their data show -> these layers
        self._split: dict[str, list[str]] = {}

    def add(self, target: LinearWeight, layer: nn.Module | QuantizedWeight) -> None:
        """Note the layer that goes to ``target``, or its weight where all are packed together."""
        stacks = self._holders.setdefault(target.module, {})
        stack = stacks.setdefault(target.parameter, _Stack())
        stack.experts.setdefault(target.expert or 0, []).append((target.part, layer))
        stack.is_interleaved |= target.is_interleaved
        plan = self._grouped.get(target.module)
        if plan and plan.pieces == sum(stack.count for stack in stacks.values()):
            self._complete.append(target.module)

    def install_complete(self, model: CausalLM) -> None:
        """Pack the layers of experts that are packed as a whole and complete, and put them in."""
        for holder in self._complete:
            stacks = self._holders[holder]
            plan = self._grouped[holder]
            reasons = map(_per_expert_reason, stacks.values())
            if reason := next((reason for reason in reasons if reason), None):
                self._split.setdefault(reason, []).append(holder)
                _split_up(stacks, plan.spec)
            else:
                del self._holders[holder]
                _install_grouped(model, holder, stacks, plan)
        self._complete.clear()

    def install(self, model: CausalLM) -> None:
        """Replace the parameters of ``model`` that hold the experts which are left, and warn of
        those that could not be packed as a whole.
        """
        for reason, holders in self._split.items():
            warnings.warn(slow_experts(reason, holders), RuntimeWarning, stacklevel=2)
        for holder, stacks in self._holders.items():
            for parameter, stack in stacks.items():
                layers = [in_order(stack.experts[number]) for number in sorted(stack.experts)]
                modules = [
                    [part for part in parts if isinstance(part, nn.Module)] for parts in layers
                ]
                built = ExpertStack(modules, is_interleaved=stack.is_interleaved)
                setattr(model.get_submodule(holder), parameter, built)
        self._holders.clear()


def _split_up(stacks: Mapping[str, _Stack], spec: ExpertsSpec) -> None:
    """Make layers of the weights of experts."""
    for parameter, stack in stacks.items():
        linear = spec.down if parameter == DOWN else spec.up
        for parts in stack.experts.values():
            for index, (part, weight) in enumerate(parts):
                if isinstance(weight, QuantizedWeight):
                    alone = replace(linear, shape=weight.shape)
                    choice = choose(alone, device_of(weight.data.device))
                    parts[index] = part, QuantizedLinear(alone, choice, scaled_by_row(weight))


def _install_grouped(
    model: CausalLM, holder: str, stacks: dict[str, _Stack], plan: GroupedPlan
) -> None:
    """Pack the experts of ``holder`` and put them in its place; takes ``stacks`` apart."""
    up_name = next(name for name in UP if name in stacks)
    module = model.get_submodule(holder)
    up_bias, down_bias = (getattr(module, f"{name}_bias", None) for name in (up_name, DOWN))
    up, down = _weights(stacks.pop(up_name)), _weights(stacks.pop(DOWN))
    weights = ExpertWeights(up, down, up_bias, down_bias)
    model.set_submodule(holder, GroupedExperts(plan.spec, plan.kernel, weights))


def _weights(stack: _Stack) -> list[QuantizedWeight]:
    """Return the weight of each expert, its parts joined in the model's order."""
    whole = []
    for number in sorted(stack.experts):
        parts = in_order(stack.experts.pop(number))
        joined = join([scaled_by_row(part) for part in parts if isinstance(part, QuantizedWeight)])
        whole.append(interleave(joined) if stack.is_interleaved and len(parts) > 1 else joined)
    return whole


def _per_expert_reason(stack: _Stack) -> str | None:
    """Return why the experts cannot be packed together, as only their data show."""
    for parts in stack.experts.values():
        weights = [part for _, part in parts if isinstance(part, QuantizedWeight)]
        if any(weight.perm is not None for weight in weights):
            return "they reorder their inputs (act-order)"
        if any(weight.pre_scale is not None for weight in weights):
            return "each multiplies its inputs by factors of its own (pre_quant_scale)"
        if not all(same_input(weights[0], weight) for weight in weights[1:]):
            return "their layers have calibrated input scales of their own"
    return None


def stacked_biases(
    layers: Iterable[tuple[str, LinearWeight]],
    read: Callable[[str], Tensor],
    present: Collection[str],
) -> dict[str, Tensor]:
    """Return the biases of experts that lie apart, as the parameters of the model that stack them.

    Args:
        layers: names and targets of layers.
        read: returns a tensor of the checkpoint.
        present: the names of its tensors.
    """
    found: dict[str, dict[int, list[tuple[int, Tensor]]]] = {}
    interleaved = {}
    for name, target in layers:
        bias = f"{name}.bias"
        if target.expert is not None and not target.is_stacked and bias in present:
            parameter = f"{target.module}.{target.parameter}_bias"
            interleaved[parameter] = target.is_interleaved
            experts = found.setdefault(parameter, {})
            experts.setdefault(target.expert, []).append((target.part, read(bias)))
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
