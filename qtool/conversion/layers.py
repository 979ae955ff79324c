"""What one layer becomes: its weight read, kept or rounded again, and written in another format; on
the meta device, only shapes and dtypes.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from qtool.checkpoint import Checkpoint, TensorInfo
from qtool.checkpoint.shards import TensorSpec
from qtool.conversion.targets import GPTQ_V2
from qtool.formats import FORMATS, WRITABLE, Format, Layout, QuantizedModule, tensor_name
from qtool.formats.packing import DTYPE_NAMES, TORCH_DTYPES, load, outline, read_tensor, torch_dtype
from qtool.weight import QuantizedWeight, dequantize, quantize

if TYPE_CHECKING:
    from torch import Tensor

Value = QuantizedWeight | torch.Tensor  # of a layer of the source, quantized or plain
CODES = (".weight", ".weight_packed")  # no format makes anything else of them


@dataclass(frozen=True)
class Layer:
    """A linear layer of the source, quantized or plain, and the ``target`` it becomes, None for a
    plain weight; ``rounded``: its codes are new.
    """

    source: QuantizedModule | TensorInfo
    target: QuantizedModule | None
    rounded: bool


@dataclass(frozen=True)
class Write:
    """A tensor to be written; ``copied`` is the source's tensor whose bytes it has, None when it is
    computed.
    """

    spec: TensorSpec
    copied: TensorInfo | None


def format_of(to: str) -> Format:
    """Return the format that writes ``to``, the name of a format or of a version of one."""
    return WRITABLE["gptq" if to == GPTQ_V2 else to]


def read_value(
    checkpoint: Checkpoint,
    layout: Layout | None,
    source: QuantizedModule | TensorInfo,
    *,
    meta: bool = False,
) -> Value:
    """Return what ``source`` holds; with ``meta`` without its data, of which only ``g_idx`` is
    read.
    """
    if isinstance(source, TensorInfo):
        return (
            torch.empty(source.shape, dtype=torch_dtype(source), device="meta")
            if meta
            else read_tensor(checkpoint, source.name)
        )
    assert layout is not None
    return FORMATS[layout.format].read(source, (outline if meta else load)(checkpoint, source))


def dense(value: Value, dtype: torch.dtype) -> Tensor:
    """Return the weight [N, K] that ``value`` stands for, the factor of its input multiplied in."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype)
    if value.pre_scale is None:
        return dequantize(value, dtype)
    return (dequantize(value) * value.pre_scale.float()).to(dtype)


def new_weight(
    target: QuantizedModule, value: Value, *, rounded: bool, dtype: torch.dtype
) -> QuantizedWeight:
    """Return the weight of ``target``: ``value`` itself, or rounded to nearest in its scheme by way
    of ``dtype``; with the inputs of its scheme.
    """
    activation = value.activation if isinstance(value, QuantizedWeight) else None
    if activation and activation.format != target.scheme.activations:
        activation = None
    if isinstance(value, QuantizedWeight) and not rounded:
        return replace(value, activation=activation)
    weight = quantize(dense(value, dtype), target.scheme)
    return replace(weight, activation=activation) if activation else weight


def written_tensors(layer: Layer, value: Value, to: str, dtype: str) -> dict[str, Tensor]:
    """Return the tensors that ``layer`` becomes in ``to``, by name; ``dtype`` is that of plain
    weights.
    """
    if layer.target is not None:
        weight = new_weight(layer.target, value, rounded=layer.rounded, dtype=TORCH_DTYPES[dtype])
        written = format_of(to).write(layer.target, weight)
        return {tensor_name(layer.target, suffix): tensor for suffix, tensor in written.items()}
    values, source = dense(value, TORCH_DTYPES[dtype]), layer.source
    if isinstance(source, QuantizedModule) and source.experts > 1:  # transformers keeps [E, K, N]
        return {
            source.name: values.view(source.experts, -1, values.shape[1])
            .transpose(1, 2)
            .contiguous()
        }
    return {f"{source.name}.weight": values}


def writes_of(
    checkpoint: Checkpoint, layout: Layout | None, layer: Layer, to: str, dtype: str
) -> tuple[Write, ...]:
    """Return what ``layer`` writes, found by converting it without data: what comes out as the
    object that went in is a copy.
    """
    source, passed = layer.source, {}
    if isinstance(source, QuantizedModule) and layout is not None:
        tensors = outline(checkpoint, source)
        passed = {id(tensor): source.tensors[suffix] for suffix, tensor in tensors.items()}
        value: Value = FORMATS[layout.format].read(source, tensors)
    else:
        value = read_value(checkpoint, layout, source, meta=True)
    written = written_tensors(layer, value, to, dtype)
    return tuple(
        Write(
            TensorSpec(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)), passed.get(id(tensor))
        )
        for name, tensor in written.items()
    )


def dedup_key(source: QuantizedModule | TensorInfo, act_order: bool) -> Hashable:
    """Return what is equal for layers that convert alike: all but their names and numbers."""
    if isinstance(source, TensorInfo):
        return source.dtype, source.shape
    tensors = tuple(
        (suffix, tensor.dtype, tensor.shape) for suffix, tensor in source.tensors.items()
    )
    return source.scheme, source.shape, source.variant, source.experts, act_order, tensors


def writes_like(known: Layer, writes: tuple[Write, ...], layer: Layer) -> tuple[Write, ...]:
    """Return what ``layer`` writes, from the ``writes`` of one that is like it."""
    if known is layer:
        return writes
    old, new = (each.source.name.removesuffix(".weight") for each in (known, layer))
    there = _tensors(known.source)
    here, suffixes = (
        _tensors(layer.source),
        {tensor.name: suffix for suffix, tensor in there.items()},
    )
    return tuple(
        Write(
            replace(write.spec, name=new + write.spec.name[len(old) :]),
            write.copied and here[suffixes[write.copied.name]],
        )
        for write in writes
    )


def _tensors(source: QuantizedModule | TensorInfo) -> Mapping[str, TensorInfo]:
    return {"weight": source} if isinstance(source, TensorInfo) else source.tensors


def computed_tensors(
    checkpoint: Checkpoint,
    layout: Layout | None,
    layer: Layer,
    writes: Iterable[Write],
    to: str,
    dtype: str,
) -> dict[str, Tensor]:
    """Return the tensors of ``writes`` that are no copies, by name; codes that are only copied are
    not read.
    """
    source, copied = (
        layer.source,
        {
            write.copied.name
            for write in writes
            if write.copied and write.copied.name.endswith(CODES)
        },
    )
    if isinstance(source, QuantizedModule) and layout is not None and copied:
        tensors = outline(checkpoint, source)
        tensors |= {
            suffix: read_tensor(checkpoint, info.name)
            for suffix, info in source.tensors.items()
            if suffix in tensors and info.name not in copied
        }
        value: Value = FORMATS[layout.format].read(source, tensors)
    else:
        value = read_value(checkpoint, layout, source)
    wanted = {write.spec.name for write in writes if not write.copied}
    return {
        name: tensor
        for name, tensor in written_tensors(layer, value, to, dtype).items()
        if name in wanted
    }
