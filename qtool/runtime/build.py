"""The modules that the layers of a checkpoint become: weights that share an input are joined and
packed for their kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from qtool import formats
from qtool.formats.packing import read_tensor
from qtool.runtime.kernels import device_of
from qtool.runtime.linear import FusedLinear, QuantizedLinear, SharedInput
from qtool.runtime.load_plan import Group, LoadPlan, Source, cached_choice, make_group
from qtool.runtime.skeleton import Place
from qtool.weight import Activation, QuantizedWeight, quantize

RawTensors = dict[str, Tensor]


def build_modules(
    plan: LoadPlan, group: Group, raw: Sequence[RawTensors]
) -> Iterator[tuple[Place, nn.Module]]:
    """Yield the modules that the layers of ``group`` become: one for all where what they ask of
    their input is the same.
    """
    weights = [
        _weight(plan, source, tensors) for source, tensors in zip(group.sources, raw, strict=True)
    ]
    if group.sources[0].experts > 1:
        (source,), ((weight, _),) = group.sources, weights
        rows = source.shape[0] // source.experts
        for expert in range(source.experts):
            piece = _rows(weight, expert * rows, (expert + 1) * rows)
            yield (
                replace(source.place, expert=expert),
                QuantizedLinear(group.spec, group.choice, piece),
            )
        return
    members = list(zip(group.sources, weights, strict=True))
    del weights
    while members:
        alike = [member for member in members if _same_input(members[0][1][0], member[1][0])]
        members = [member for member in members if all(member is not other for other in alike)]
        yield from _fused(plan, alike)


def _weight(
    plan: LoadPlan, source: Source, tensors: RawTensors
) -> tuple[QuantizedWeight, Tensor | None]:
    """Return the weight that ``tensors``, which are taken, stand for, and its bias, on the
    device.
    """
    moved = {suffix: tensors.pop(suffix).to(plan.device) for suffix in list(tensors)}
    bias = moved.pop("bias", None)
    scheme = source.scheme
    assert scheme is not None
    if plan.layout is None or source.name not in plan.layout.modules:
        return quantize(moved["weight"], scheme), bias
    module = plan.layout.modules[source.name]
    weight = formats.FORMATS[plan.layout.format].read(module, moved)
    if scheme.activations != module.scheme.activations:
        weight = replace(
            weight, activation=Activation(scheme.activations) if scheme.activations else None
        )
    return weight, bias


def _fused(
    plan: LoadPlan, members: list[tuple[Source, tuple[QuantizedWeight, Tensor | None]]]
) -> Iterator[tuple[Place, nn.Module]]:
    """Yield the modules of layers that become one matrix; ``members`` are taken, so that their
    weights need not outlive it.
    """
    sources = [source for source, _ in members]
    weight, bias = (
        _stacked([weight for _, (weight, _) in members]),
        _stacked_bias([bias for _, (_, bias) in members], sources),
    )
    members.clear()
    group = make_group(sources, plan.skeleton.dtype, plan.device, second_copy=plan.second_copy)
    spec, choice = group.spec, group.choice
    if spec.scheme.weights.granularity == "tensor" and bool(
        (weight.scale != weight.scale[0]).any()
    ):
        spec = replace(
            spec,
            scheme=replace(
                spec.scheme, weights=replace(spec.scheme.weights, granularity="channel")
            ),
        )
        choice = cached_choice(spec, device_of(plan.device), second_copy=plan.second_copy)
    whole = QuantizedLinear(spec, choice, weight, bias)
    if len(sources) == 1 or sources[0].place.parameter:
        yield sources[0].place, whole
        return
    shared = SharedInput(whole, [source.shape[0] for source in sources])
    for index, source in enumerate(sources):
        yield source.place, FusedLinear(shared, index)


def _same_input(one: QuantizedWeight, other: QuantizedWeight) -> bool:
    pairs = zip(_asked_of_input(one), _asked_of_input(other), strict=True)
    return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


def _asked_of_input(weight: QuantizedWeight) -> tuple[Tensor | None, ...]:
    activation = weight.activation
    static = (activation.scale, activation.zero) if activation else (None, None)
    return weight.perm, weight.pre_scale, *static


def _stacked(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Return ``weights``, which ask the same of their input, as one of all their outputs."""
    first = weights[0]
    if len(weights) == 1:
        return first
    dtype = (
        first.scale.dtype if len({weight.scale.dtype for weight in weights}) == 1 else torch.float32
    )

    def joined(name: str) -> Tensor | None:
        parts = [part for weight in weights if (part := getattr(weight, name)) is not None]
        return torch.cat(parts) if parts else None

    scale = torch.cat([weight.scale.to(dtype) for weight in weights])
    return replace(
        first,
        data=torch.cat([weight.data for weight in weights]),
        scale=scale,
        scale2=joined("scale2"),
        zero=joined("zero"),
    )


def _stacked_bias(biases: Sequence[Tensor | None], sources: Sequence[Source]) -> Tensor | None:
    present = next((bias for bias in biases if bias is not None), None)
    if present is None:
        return None
    return torch.cat(
        [
            present.new_zeros(source.shape[0]) if bias is None else bias
            for bias, source in zip(biases, sources, strict=True)
        ]
    )


def _rows(weight: QuantizedWeight, start: int, stop: int) -> QuantizedWeight:
    """Return the outputs ``start`` to ``stop`` of ``weight``, whose scales cover one row each."""
    parts = {
        name: part[start:stop]
        for name in ("data", "scale", "scale2", "zero")
        if (part := getattr(weight, name)) is not None
    }
    return replace(weight, **parts)


def build_unquantized(plan: LoadPlan, source: Source) -> nn.Linear:
    """Read an unquantized linear layer."""
    weight = read_tensor(plan.checkpoint, f"{source.name}.weight").to(
        plan.device, plan.skeleton.dtype
    )
    bias = f"{source.name}.bias"
    linear = nn.Linear(
        source.shape[1], source.shape[0], bias=bias in plan.checkpoint.tensors, device="meta"
    )
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if linear.bias is not None:
        linear.bias = nn.Parameter(
            read_tensor(plan.checkpoint, bias).to(plan.device, plan.skeleton.dtype),
            requires_grad=False,
        )
    return linear
