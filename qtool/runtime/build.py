"""The modules that the layers of a checkpoint become, packed for their kernels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qtool import formats
from qtool.formats.packing import read_tensor
from qtool.name_map import LinearWeight
from qtool.runtime.join import join, rows, same_input
from qtool.runtime.kernels import cached_choice, device_of, with_channel_scales
from qtool.runtime.linear import FusedLinear, QuantizedLinear, SharedInput
from qtool.runtime.load_plan import Group, LoadPlan, make_group
from qtool.runtime.source import Source
from qtool.weight import Activation, QuantizedWeight, dequantize, quantize, with_one_scale

RawTensors = dict[str, Tensor]


@dataclass(frozen=True)
class _Member:
    """A layer of a group with its data."""

    source: Source
    weight: QuantizedWeight
    bias: Tensor | None


def build_modules(
    plan: LoadPlan, group: Group, raw: Sequence[RawTensors]
) -> Iterator[tuple[LinearWeight, nn.Module | QuantizedWeight]]:
    """Yield the modules that the layers of ``group`` become, and where they go; the weights of
    experts that are packed together.

    Layers become one module if their weights require the same of their input.
    """
    members = [
        _read_member(plan, source, tensors)
        for source, tensors in zip(group.sources, raw, strict=True)
    ]
    is_grouped = group.sources[0].target.module in plan.experts
    if group.sources[0].experts > 1:
        (stack,) = members
        for target, weight in _unstack_experts(stack):
            yield (
                target,
                weight if is_grouped else QuantizedLinear(group.spec, group.choice, weight),
            )
        return
    if is_grouped:
        for member in members:
            yield member.source.target, member.weight
        return
    while members:
        same = [same_input(members[0].weight, member.weight) for member in members]
        together = [member for member, is_same in zip(members, same, strict=True) if is_same]
        members = [member for member, is_same in zip(members, same, strict=True) if not is_same]
        yield from _fuse(plan, together)


def _unstack_experts(stack: _Member) -> Iterator[tuple[LinearWeight, QuantizedWeight]]:
    """Yield the weight of each of the experts that are stacked in one."""
    source = stack.source
    size = source.shape[0] // source.experts
    for expert in range(source.experts):
        piece = rows(stack.weight, expert * size, (expert + 1) * size)
        yield replace(source.target, expert=expert), piece


def _read_member(plan: LoadPlan, source: Source, tensors: RawTensors) -> _Member:
    """Return the weight and bias of a layer on the device; empties ``tensors``."""
    moved = {suffix: tensors.pop(suffix).to(plan.device) for suffix in list(tensors)}
    bias = moved.pop("bias", None)
    scheme = source.scheme
    assert scheme is not None
    if plan.layout is None or source.name not in plan.layout.modules:
        return _Member(source, quantize(moved["weight"], scheme), bias)
    module = plan.layout.modules[source.name]
    weight = with_one_scale(formats.FORMATS[plan.layout.format].read(module, moved))
    if scheme.activations != module.scheme.activations:
        activation = Activation(scheme.activations) if scheme.activations else None
        weight = replace(weight, activation=activation)
    return _Member(source, weight, bias)


def _fuse(plan: LoadPlan, members: list[_Member]) -> Iterator[tuple[LinearWeight, nn.Module]]:
    """Yield the modules of layers that become one matrix.

    Empties ``members``, so that their weights do not outlive the join.
    """
    sources = [member.source for member in members]
    weight = join([member.weight for member in members])
    bias = _join_biases(members)
    members.clear()
    group = make_group(sources, plan.skeleton.dtype, plan.device, second_copy=plan.second_copy)
    spec, choice = group.spec, group.choice
    if spec.scheme.weights.granularity == "tensor" and bool(
        (weight.scale != weight.scale[0]).any()
    ):
        spec = with_channel_scales(spec)
        choice = cached_choice(spec, device_of(plan.device), second_copy=plan.second_copy)
    whole = QuantizedLinear(spec, choice, weight, bias)
    if len(sources) == 1 or sources[0].target.parameter:
        yield sources[0].target, whole
        return
    shared = SharedInput(whole, [source.shape[0] for source in sources])
    for index, source in enumerate(sources):
        yield source.target, FusedLinear(shared, index)


def _join_biases(members: Sequence[_Member]) -> Tensor | None:
    """Return the biases in order, zeros where a layer has none; None if no layer has one."""
    present = next((member.bias for member in members if member.bias is not None), None)
    if present is None:
        return None
    return torch.cat(
        [
            present.new_zeros(member.source.shape[0]) if member.bias is None else member.bias
            for member in members
        ]
    )


def build_unquantized(plan: LoadPlan, source: Source) -> nn.Linear:
    """Read one expert that stays in 16 bits; the model has the biases of all experts in a stack."""
    rows, columns = source.shape
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    linear.weight = _read_parameter(plan, f"{source.name}.weight")
    return linear


def dequantized_weights(plan: LoadPlan) -> dict[str, Tensor]:
    """Return the quantized layers that the model needs in 16 bits, by the names of their tensors;
    factors of their inputs are multiplied in.
    """
    found = {}
    for source in plan.dequantized:
        assert plan.layout is not None
        module = plan.layout.modules[source.name]
        if bias := module.tensors.get("bias"):
            found[f"{source.name}.bias"] = read_checked(plan, bias.name)
        found[f"{source.name}.weight"] = dequantized_matrix(plan, source.name)
    return found


def dequantized_matrix(plan: LoadPlan, name: str) -> Tensor:
    """Return the matrix of the layer ``name``, quantized or not, in host memory; factors of its
    inputs are multiplied in.
    """
    if plan.layout is None or name not in plan.layout.modules:
        return read_checked(plan, f"{name}.weight").to(plan.skeleton.dtype)
    module = plan.layout.modules[name]
    raw = {
        suffix: read_checked(plan, info.name)
        for suffix, info in module.tensors.items()
        if suffix != "bias"
    }
    weight = formats.FORMATS[plan.layout.format].read(module, raw)
    values = dequantize(weight)
    if weight.pre_scale is not None:
        values *= weight.pre_scale.float()
    return values.to(plan.skeleton.dtype)


def read_checked(plan: LoadPlan, name: str) -> Tensor:
    """Return the tensor ``name``, whose values are checked while they are in the CPU's cache.

    Raises: CheckpointRefused, for NaN, infinity and impossible scales.
    """
    tensor = read_tensor(plan.checkpoint, name)
    if not tensor.numel():
        return tensor
    info = plan.checkpoint.tensors[name]
    data = tensor.reshape(-1).view(torch.uint8).numpy()
    if problem := formats.problem_in(info, data, plan.layout):
        raise formats.damaged(f"{info.file}: `{name}` {problem}")
    return tensor


def _read_parameter(plan: LoadPlan, name: str) -> nn.Parameter:
    tensor = read_checked(plan, name).to(plan.device, plan.skeleton.dtype)
    return nn.Parameter(tensor, requires_grad=False)
