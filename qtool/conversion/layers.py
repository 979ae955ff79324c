"""One linear layer in a conversion: what it was, what it becomes, and the tensors it writes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from qtool.checkpoint import TensorInfo
from qtool.checkpoint.shards import TensorSpec
from qtool.conversion.request import ConversionRequest
from qtool.formats import QuantizedModule, tensor_name
from qtool.formats.packing import DTYPE_NAMES, TORCH_DTYPES
from qtool.formats.stored_layer import (
    Source,
    Value,
    dense,
    outline_tensors,
    read_value,
    value_of,
)
from qtool.weight import QuantizedWeight, quantize, with_one_scale

if TYPE_CHECKING:
    from torch import Tensor

CODES = (".weight", ".weight_packed")  # a format copies them, or makes new ones of them


@dataclass(frozen=True)
class Layer:
    """A linear layer of the source and what it becomes."""

    source: Source
    target: QuantizedModule | None
    """None when it is dequantized."""
    rounded: bool
    """Whether its codes are new."""


@dataclass(frozen=True)
class Write:
    """A tensor to be written."""

    spec: TensorSpec
    copied: TensorInfo | None
    """The tensor of the source that it is a copy or a cast of; None when it is computed."""


@dataclass(frozen=True)
class Step:
    """A layer and all it writes; or without a layer, what one tensor of the source becomes."""

    layer: Layer | None
    writes: tuple[Write, ...]

    @property
    def copies(self) -> tuple[Write, ...]:
        """The writes of a layer that are copied from file to file.

        Where other tensors are computed, these are the codes alone: the computation reads all other
        tensors, so they are written from memory, and nothing is read twice.
        """
        if all(write.copied for write in self.writes):
            return self.writes
        return tuple(
            write for write in self.writes if write.copied and write.copied.name.endswith(CODES)
        )


def new_weight(
    target: QuantizedModule, value: Value, *, rounded: bool, dtype: torch.dtype
) -> QuantizedWeight:
    """Return the weight of ``target``, with the activations of its scheme.

    Args:
        target: the layer of the result.
        value: what the source holds.
        rounded: whether ``value`` is rounded to nearest in the scheme of ``target``; otherwise its
            codes are kept.
        dtype: what ``value`` is dequantized to before it is rounded.
    """
    activation = value.activation if isinstance(value, QuantizedWeight) else None
    if activation and activation.format != target.scheme.activations:
        activation = None
    if isinstance(value, QuantizedWeight) and not rounded:
        return replace(with_one_scale(value), activation=activation)
    weight = quantize(dense(value, dtype), target.scheme)
    return replace(weight, activation=activation) if activation else weight


def written_tensors(request: ConversionRequest, layer: Layer, value: Value) -> dict[str, Tensor]:
    """Return the tensors that ``layer``, which holds ``value``, becomes, by name."""
    dtype = TORCH_DTYPES[request.dtype]
    target = layer.target
    if target is not None:
        weight = new_weight(target, value, rounded=layer.rounded, dtype=dtype)
        written = request.format.write(target, weight)
        return {tensor_name(target, suffix): tensor for suffix, tensor in written.items()}
    values = dense(value, dtype)
    experts = layer.source.module.experts if layer.source.module else 1
    if experts > 1:
        stacked = values.view(experts, -1, values.shape[1])
        return {layer.source.name: stacked.transpose(1, 2).contiguous()}  # as transformers has them
    return {f"{layer.source.name}.weight": values}


def writes_of(request: ConversionRequest, layer: Layer) -> tuple[Write, ...]:
    """Return what ``layer`` writes, found by converting it without data.

    A tensor that comes out as the object that went in is a copy.
    """
    tensors = outline_tensors(layer.source)
    read = {id(tensor): layer.source.tensors[suffix] for suffix, tensor in tensors.items()}
    value = value_of(request.layout, layer.source, tensors)
    return tuple(
        Write(
            spec=TensorSpec(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)),
            copied=read.get(id(tensor)),
        )
        for name, tensor in written_tensors(request, layer, value).items()
    )


def writes_like(known: Layer, writes: tuple[Write, ...], layer: Layer) -> tuple[Write, ...]:
    """Return what ``layer`` writes, from the ``writes`` of a layer with the same dedup key."""
    if known is layer:
        return writes
    old = known.source
    new = layer.source
    suffixes = {tensor.name: suffix for suffix, tensor in old.tensors.items()}
    return tuple(
        Write(
            spec=replace(write.spec, name=new.name + write.spec.name[len(old.name) :]),
            copied=write.copied and new.tensors[suffixes[write.copied.name]],
        )
        for write in writes
    )


def convert_layer(request: ConversionRequest, layer: Layer, step: Step) -> dict[str, Tensor]:
    """Return the tensors that ``step`` writes from memory, by name.

    Every tensor of the source is read once; those that are copied from file to file are not read.
    """
    copied = {write.spec.name: write.copied.name for write in step.copies if write.copied}
    if len(copied) == len(step.writes):
        return {}
    value = read_value(
        request.checkpoint, request.layout, layer.source, skipped=frozenset(copied.values())
    )
    written = written_tensors(request, layer, value)
    return {name: tensor for name, tensor in written.items() if name not in copied}
