"""Which layers of experts are packed as a whole, decided without data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qtool.runtime.experts.gates import gate_of
from qtool.runtime.experts.grouped import ExpertsSpec, choose_experts
from qtool.runtime.kernels import LinearSpec, device_of, linear_spec, with_channel_scales
from qtool.runtime.skeleton import Skeleton
from qtool.runtime.source import Source

UP = ("gate_up_proj", "up_proj")
"""What transformers' modules of experts call the parameter of the first product."""
DOWN = "down_proj"
"""The second."""


@dataclass(frozen=True)
class GroupedPlan:
    """How a layer of experts is packed as a whole."""

    spec: ExpertsSpec
    kernel: str
    pieces: int
    """How many weights make up the layer."""


class _OneByOne(Exception):
    """Why experts are multiplied one after another."""


def plan_experts(
    skeleton: Skeleton, sources: Sequence[Source], device: torch.device
) -> tuple[dict[str, GroupedPlan], list[str]]:
    """Return the modules of experts that are packed as a whole, and a warning for the others.

    Args:
        skeleton: the model.
        sources: its quantized layers.
        device: where it will run.
    """
    holders: dict[str, list[Source]] = defaultdict(list)
    for source in sources:
        if source.target.parameter:
            holders[source.target.module].append(source)
    grouped = {}
    reasons = defaultdict(list)
    for holder, members in holders.items():
        try:
            grouped[holder] = _plan_layer(skeleton, holder, members, device)
        except _OneByOne as error:
            reasons[str(error)].append(holder)
    if device.type != "cuda":
        return grouped, []
    return grouped, [slow_experts(reason, layers) for reason, layers in reasons.items()]


def slow_experts(reason: str, layers: Sequence[str]) -> str:
    """Return the warning that the experts of ``layers`` are not packed as a whole."""
    return (
        f"the experts of {len(layers)} layers (`{layers[0]}`) are multiplied one after another, "
        f"which is slow: {reason}"
    )


def _plan_layer(
    skeleton: Skeleton, holder: str, members: Sequence[Source], device: torch.device
) -> GroupedPlan:
    """Raises: _OneByOne, with the reason."""
    module = skeleton.module(holder)
    if not hasattr(module, "has_gate"):
        raise _OneByOne(f"transformers' {type(module).__name__} multiplies them by its own code")
    by_parameter: dict[str, list[Source]] = defaultdict(list)
    for source in members:
        by_parameter[source.target.parameter].append(source)
    up_name = UP[0] if module.has_gate else UP[1]
    if {*by_parameter} != {up_name, DOWN}:
        raise _OneByOne("only some of their matrices are quantized")
    matrices = {f"{name}{suffix}" for name in (up_name, DOWN) for suffix in ("", "_bias")}
    if others := sorted({name for name, _ in module.named_parameters()} - matrices):
        raise _OneByOne(f"they also have the weights `{'`, `'.join(others)}`")
    count: int = module.get_parameter(DOWN).shape[0]
    up, down = (_linear(skeleton, by_parameter[name], count) for name in (up_name, DOWN))
    spec = ExpertsSpec(count, up, down, gate_of(module))
    kernel, reason = choose_experts(spec, device_of(device))
    if kernel is None:
        raise _OneByOne(reason)
    return GroupedPlan(spec, kernel, sum(source.experts for source in members))


def _linear(skeleton: Skeleton, members: Sequence[Source], count: int) -> LinearSpec:
    """Return the matrix of an expert that ``members`` are parts of, for all experts.

    Raises: _OneByOne, if the experts differ.
    """
    schemes = {source.scheme for source in members}
    shapes = {(source.target.part, _shape(source)) for source in members}
    parts = members[0].target.parts if members[0].experts == 1 else 1
    complete = sum(source.experts for source in members) == count * parts
    if len(schemes) > 1 or len(shapes) > parts or not complete:
        raise _OneByOne("they have different schemes")
    (scheme,) = schemes
    assert scheme is not None
    outputs = sum(shape[0] for _, shape in shapes)
    spec = linear_spec(scheme, (outputs, members[0].shape[1]), skeleton.dtype)
    return with_channel_scales(spec) if scheme.weights.granularity == "tensor" else spec


def _shape(source: Source) -> tuple[int, int]:
    """Return the shape of the source's matrix of one expert."""
    return source.shape[0] // source.experts, source.shape[1]
