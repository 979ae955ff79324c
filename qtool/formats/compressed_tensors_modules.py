"""What the headers of a layer of compressed-tensors say about its scheme, given its group of the
config.

Source: compressed-tensors 0.19, `quantization/quant_args.py`, `compressors/`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Hashable

from qtool.checkpoint import Checkpoint
from qtool.checkpoint.model import FLOAT_DTYPES
from qtool.formats.compressed_tensors_config import Arguments, Group
from qtool.formats.layout import (
    TRUNCATED,
    Parts,
    QuantizedModule,
    block_size,
    group_size,
    refused,
)
from qtool.scheme import Activations, Granularity, ScaleFormat, Scheme, Weights

FLOATS = tuple(sorted(FLOAT_DTYPES))
NUMBERS = {  # dtype -> its letter in `struct`
    **{"I64": "q", "I32": "i", "I16": "h", "I8": "b"},
    **{"U64": "Q", "U32": "I", "U16": "H", "U8": "B"},
    **{"F64": "d", "F32": "f", "F16": "e", "BF16": "f"},
}
SCALE_DTYPES = {"e4m3": ("F8_E4M3",), "e8m0": ("U8", "F8_E8M0"), "float": FLOATS}


class ModuleReader:
    """Describes quantized layers; those whose headers are alike are looked at once."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._known: dict[Hashable, QuantizedModule] = {}

    def read(self, parts: Parts, group: Group) -> QuantizedModule:
        """Return the layer that ``parts`` are of.

        Raises: CheckpointRefused, when they do not fit ``group``.
        """
        headers = [(suffix, part.dtype, part.shape) for suffix, part in parts.tensors.items()]
        key = (id(group), *headers)
        like = self._known.get(key)
        if like is None or "weight_shape" in parts:  # whose data may say more than its header
            like = self._known[key] = _module(self._checkpoint, parts, group)
        return QuantizedModule(parts.name, like.scheme, like.shape, parts.tensors)


def is_quantized(parts: Parts) -> bool:
    """Whether ``parts`` are of a quantized layer."""
    if "weight_packed" in parts or "weight_global_scale" in parts:
        return True
    if "weight" in parts:
        return parts["weight"].dtype not in FLOATS
    return "weight_scale" in parts  # a quantized module that has lost its weight


def _module(checkpoint: Checkpoint, parts: Parts, group: Group) -> QuantizedModule:
    args = group.weights
    if args.is_float and args.bits == 4:
        rows, half = parts.matrix("weight_packed", "U8")
        shape = rows, 2 * half
    elif "weight_packed" in parts or "weight_shape" in parts:
        shape = _packed_shape(checkpoint, parts, args)
    else:
        shape = parts.matrix("weight", "F8_E4M3" if args.is_float else "I8")
    weights = _weights(parts, args, shape)
    activations = _activations(parts, group.inputs) if group.inputs else None
    return QuantizedModule(parts.name, Scheme(weights, activations), shape, parts.tensors)


def _packed_shape(checkpoint: Checkpoint, parts: Parts, args: Arguments) -> tuple[int, int]:
    """Return (N, K) of an integer matrix packed along K; ``weight_shape`` is read only where the
    header leaves K open.
    """
    bits, group = args.bits, args.group_size
    rows, words = parts.matrix("weight_packed", "I32")
    scale = parts["weight_scale"]
    columns = words * 32 // bits
    if 32 % bits == 0 and group and len(scale.shape) == 2 and columns == scale.shape[1] * group:
        return rows, columns
    shape = _stored_shape(checkpoint, parts)
    dense, padded = math.ceil(shape[1] * bits / 32), math.ceil(shape[1] / (32 // bits))
    if shape[0] != rows or words not in (dense, padded):
        raise parts.misfit(
            "weight_packed",
            f"[{shape[0]}, {dense}] for {bits}-bit weights of `weight_shape` {list(shape)}",
            code="E_WEIGHT_SHAPE",
        )
    return shape


def _stored_shape(checkpoint: Checkpoint, parts: Parts) -> tuple[int, int]:
    """Return the two numbers in ``weight_shape``, whatever its dtype."""
    tensor = parts["weight_shape"]
    data = checkpoint.read(tensor.name)
    if tensor.count != 2 or tensor.dtype not in NUMBERS:
        raise parts.misfit("weight_shape", "two numbers", code="E_WEIGHT_SHAPE")
    if tensor.dtype == "BF16":  # the upper half of an f32
        data = b"\0\0" + data[:2] + b"\0\0" + data[2:]
    numbers = struct.Struct(f"<2{NUMBERS[tensor.dtype]}")
    if len(data) != numbers.size:
        raise refused("E_TRUNCATED", f"{tensor.file} ends inside `{tensor.name}`", TRUNCATED)
    rows, columns = numbers.unpack(data)
    if not all(number >= 1 and float(number).is_integer() for number in (rows, columns)):
        raise parts.misfit("weight_shape", f"two whole numbers, found {[rows, columns]}")
    return int(rows), int(columns)


def _weights(parts: Parts, args: Arguments, shape: tuple[int, int]) -> Weights:
    parts["weight_scale"]
    if not args.symmetric:
        parts["weight_zero_point"]
    if args.strategy == "tensor":
        return _with_scales(parts, args, "tensor", count=1, what="one scale in all")
    if args.strategy == "channel":
        rows = shape[0]
        what = f"one scale for each of {rows} rows"
        return _with_scales(parts, args, "channel", count=rows, what=what)
    if args.strategy == "block":
        return _in_blocks(parts, args, shape)
    if args.strategy in ("group", "tensor_group"):
        return _in_groups(parts, args, shape)
    raise refused(
        "E_QUANT_STRATEGY",
        f"`{parts.name}`: weights of strategy `{args.strategy}` are not read",
        "tensor, channel, group and block are",
    )


def _with_scales(
    parts: Parts, args: Arguments, granularity: Granularity, *, count: int, what: str
) -> Weights:
    scale = parts["weight_scale"]
    if scale.dtype not in FLOATS or scale.count != count:
        raise parts.misfit("weight_scale", f"{what}, as the config says")
    return Weights(args.format, granularity, symmetric=args.symmetric)


def _in_blocks(parts: Parts, args: Arguments, shape: tuple[int, int]) -> Weights:
    rows, columns = shape
    count = parts.matrix("weight_scale", *FLOATS)
    block = args.block or (block_size(rows, count[0]), block_size(columns, count[1]))
    if count != (math.ceil(rows / block[0]), math.ceil(columns / block[1])):
        raise parts.misfit(
            "weight_scale",
            f"one scale for each block of {block[0]} x {block[1]} of {rows} x {columns}",
        )
    return Weights(args.format, "block", block=block, symmetric=args.symmetric)


def _in_groups(parts: Parts, args: Arguments, shape: tuple[int, int]) -> Weights:
    rows, columns = shape
    scale_dtype = parts["weight_scale"].dtype
    two_levels = args.strategy == "tensor_group" or scale_dtype == "F8_E4M3"
    if args.format == "fp4" and two_levels:
        scale: ScaleFormat = "e4m3"
        parts["weight_global_scale"]
    elif args.is_float and (args.bits == 4 or scale_dtype not in FLOATS):
        scale = "e8m0"
    else:
        scale = "float"
    scale_rows, groups = parts.matrix("weight_scale", *SCALE_DTYPES[scale])
    size = group_size(columns, groups, args.group_size)
    if scale_rows != rows or math.ceil(columns / size) != groups:
        raise parts.misfit(
            "weight_scale", f"one scale for each group of {size} of {rows} x {columns}"
        )
    return Weights(args.format, "group", size, symmetric=args.symmetric, scale=scale)


def _activations(parts: Parts, args: Arguments) -> Activations:
    if args.strategy == "tensor_group":
        parts["input_global_scale"]
        return Activations(args.format, "group", args.group_size or 16, scale="e4m3")
    if not args.dynamic:
        parts["input_scale"]
    is_grouped = args.strategy == "group"
    return Activations(
        args.format,
        args.strategy,  # type: ignore[arg-type]  # checked by the class
        args.group_size if is_grouped else None,
        dynamic=args.dynamic,
        symmetric=args.symmetric,
        scale="e8m0" if is_grouped and args.is_mx else "float",
    )
