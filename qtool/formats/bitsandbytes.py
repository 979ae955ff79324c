"""bitsandbytes as transformers saves it: nf4 and fp4 in blocks of the flattened matrix, and int8 by
rows (LLM.int8); read only.

Tensors go by suffix here, ``weight.absmax`` and its kind included. LLM.int8 rounds inputs at run
time, except those of columns with outliers: it approximates the product with 16-bit inputs, and
that is what is read.

Source: bitsandbytes 0.50, `functional.QuantState`, `nn/modules.py`, `autograd/_functions.py`;
    transformers 5.17, `integrations/bitsandbytes.py`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qtool.checkpoint import Checkpoint, TensorInfo
from qtool.checkpoint.model import DTYPE_BITS
from qtool.checkpoint.strict_json import Json, parse_object
from qtool.errors import CheckpointRefused
from qtool.formats.layout import SCALE_DTYPES, Layout, Parts, QuantizedModule, refused
from qtool.scheme import CODEBOOKS, SCHEMES, Format, Scheme, Weights

if TYPE_CHECKING:
    from torch import Tensor

    from qtool.weight import QuantizedWeight

NAMES = ("bitsandbytes", "bnb")
STATE = "weight.quant_state.bitsandbytes__"
ABSMAX, QUANT_MAP = "weight.absmax", "weight.quant_map"
NESTED_ABSMAX, NESTED_MAP = "weight.nested_absmax", "weight.nested_quant_map"
ROW_SCALE, ROW_ORDER = "SCB", "weight_format"
SCALES = (ABSMAX, NESTED_ABSMAX, ROW_SCALE)
FORMATS: Mapping[str, Format] = {"nf4": "nf4", "fp4": "bnb_fp4"}
"""Quantization type -> format of the weights."""
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
LARGEST_INT8 = 127
LARGEST_OFFSET = 3.4e38  # of float32; NaN is not below it either
DTYPES = ("bfloat16", "float16", "float32")  # of what was quantized
MAX_STATE_BYTES = 4096
MAX_SIDE = 1 << 31
KEYS = frozenset({"quant_type", "blocksize", "dtype", "shape"})
NESTED_KEYS = frozenset({"nested_blocksize", "nested_dtype", "nested_offset"})
MAP_TOLERANCE = 1e-4  # older releases computed the numbers of nf4, and now they are constants
BYTES_HINT = "save the model again with a current version of transformers and bitsandbytes"


def matches_config(config: Json) -> bool:
    """Whether ``config`` is of this format."""
    if method := config.get("quant_method"):
        return method in NAMES
    return any(config.get(key) is True for key in ("load_in_4bit", "load_in_8bit"))


def detect(checkpoint: Checkpoint, config: Json) -> Layout:
    """Return the layout: a module is quantized when its weight has a state or a scale by row.

    The states are JSON in tensors of a few bytes, which are read, as is the codebook of each layer.
    """
    modules = {
        parts.name: _int8(parts) if ROW_SCALE in parts else _four_bits(parts)
        for parts in _layers(checkpoint)
    }
    return Layout("bitsandbytes", modules, None, ())


def read(module: QuantizedModule, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
    """Return the common form of ``tensors``.

    Where blocks reach from one row into the next, each scale is repeated for the largest groups
    that lie in one row and one block.
    """
    import torch

    from qtool.codes import codebook
    from qtool.weight import QuantizedWeight

    rows, columns = module.shape
    if ROW_SCALE in tensors:
        scale = tensors[ROW_SCALE].float().reshape(rows, 1)
        # `int8_vectorwise_dequant` multiplies by one after the other, and does not divide
        return QuantizedWeight(tensors["weight"], scale, scale.new_full((rows,), 1 / LARGEST_INT8))
    weights = module.scheme.weights
    packed = tensors["weight"].view(torch.uint8).reshape(rows, columns // 2)
    group = weights.group_size or columns
    if packed.is_meta:
        scale = packed.new_empty(rows, columns // group, dtype=torch.float32)
    else:
        key = next(suffix for suffix in tensors if suffix.startswith(STATE))
        state = _parse_state(bytes(tensors[key].tolist()), f"{module.name}.{key}")
        scale = _absmax(state, tensors)
        if columns % state.block_size:
            first = torch.arange(rows * columns // group, device=scale.device) * group
            scale = scale[first // state.block_size]
        scale = scale.reshape(rows, columns // group)
    return QuantizedWeight(
        packed << 4 | packed >> 4,  # the high nibble is the even input there
        scale,
        codebook=codebook(weights.format, packed.device),
    )


@dataclass(frozen=True)
class _State:
    """What the JSON of a layer says."""

    quant_type: str
    block_size: int
    """Weights that share a scale, in row-major order."""
    shape: tuple[int, int]
    nested_block_size: int | None
    """Scales that share a scale; None where they are not quantized."""
    nested_offset: float


def _absmax(state: _State, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the scale of each block, f32 [B]."""
    absmax = tensors[ABSMAX].flatten()
    if state.nested_block_size is None:
        return absmax.float()
    scales = tensors[NESTED_ABSMAX].float().repeat_interleave(state.nested_block_size)
    numbers = tensors[NESTED_MAP].float()[absmax.int()]
    return numbers * scales[: absmax.numel()] + state.nested_offset


def _layers(checkpoint: Checkpoint) -> Iterator[Parts]:
    """Yield the quantized layers: those with a tensor that only this format has, or with codes."""
    layers: dict[str, dict[str, TensorInfo]] = {}
    for name, tensor in checkpoint.tensors.items():
        layer, is_part, rest = name.rpartition(".weight.")
        if is_part:
            layers.setdefault(layer, {})[f"weight.{rest}"] = tensor
        else:
            layer, _, suffix = name.rpartition(".")
            layers.setdefault(layer, {})[suffix] = tensor
    for layer, tensors in layers.items():
        weight = tensors.get("weight")
        has_codes = weight is not None and weight.dtype not in (*SCALE_DTYPES, "F64")
        if has_codes or ROW_SCALE in tensors or any(map(_is_part, tensors)):
            yield Parts(layer, tensors)


def _is_part(suffix: str) -> bool:
    return suffix in (ABSMAX, QUANT_MAP) or suffix.startswith(STATE)


def _int8(parts: Parts) -> QuantizedModule:
    rows, columns = parts.matrix("weight", "I8")
    scale = parts[ROW_SCALE]
    if scale.dtype not in SCALE_DTYPES or scale.count != rows:
        raise parts.misfit(ROW_SCALE, f"{rows} scales, one for each row", code="E_SCALE_SHAPE")
    order = parts.tensors.get(ROW_ORDER)
    if order is not None and (order.size_bytes > 8 or any(order.read())):
        raise refused(
            "E_KERNEL_LAYOUT",
            f"`{parts.name}`: bitsandbytes' int8 in the order of a GPU is a kernel's own and not "
            "read; with the `weight_format` 0 it is",
            BYTES_HINT,
        )
    return QuantizedModule(parts.name, SCHEMES["W8A16_CHANNEL"], (rows, columns), parts.tensors)


def _four_bits(parts: Parts) -> QuantizedModule:
    states = [suffix for suffix in parts.tensors if suffix.startswith(STATE)]
    if not states:
        parts[f"{STATE}nf4"]  # says that it is missing
    if len(states) > 1:
        raise _wrong_state(parts.name, f"it has {len(states)} states")
    state = _read_state(parts, states[0])
    rows, columns = state.shape
    packed, count = parts["weight"], rows * columns
    if columns % 2:
        raise refused(
            "E_KERNEL_LAYOUT",
            f"`{parts.name}`: bitsandbytes' pairs of codes reach from one row into the next, as "
            f"there are {columns} inputs, and are not read",
            "an even number of inputs is; or start from the 16-bit model it was made of",
        )
    if DTYPE_BITS.get(packed.dtype, 0) % 8 or packed.size_bytes != count // 2:
        raise parts.misfit("weight", f"the {count // 2} bytes of a matrix of {rows} x {columns}")
    _check_scales(parts, state, -(-count // state.block_size))
    _check_codebook(parts, state.quant_type)
    group = math.gcd(columns, state.block_size)
    scheme = Scheme(Weights(FORMATS[state.quant_type], "group", group))
    return QuantizedModule(parts.name, scheme, state.shape, parts.tensors)


def _check_scales(parts: Parts, state: _State, blocks: int) -> None:
    absmax, nested = parts[ABSMAX], state.nested_block_size
    if absmax.count != blocks:
        raise parts.misfit(ABSMAX, f"{blocks} scales", code="E_SCALE_SHAPE")
    if nested is None:
        if absmax.dtype not in SCALE_DTYPES:
            raise parts.misfit(ABSMAX, f"{' or '.join(SCALE_DTYPES)}", code="E_TENSOR_DTYPE")
        return
    if absmax.dtype != "U8":
        raise parts.misfit(ABSMAX, "U8, as the scales are quantized", code="E_TENSOR_DTYPE")
    for suffix, count in ((NESTED_ABSMAX, -(-blocks // nested)), (NESTED_MAP, 256)):
        if parts[suffix].count != count or parts[suffix].dtype not in SCALE_DTYPES:
            raise parts.misfit(suffix, f"{count} floats", code="E_SCALE_SHAPE")


def _check_codebook(parts: Parts, quant_type: str) -> None:
    """Refuse numbers that are not those of ``quant_type``: bitsandbytes does not look at them."""
    found = parts[QUANT_MAP]
    if found.dtype != "F32" or found.count != 16:
        raise parts.misfit(QUANT_MAP, "16 numbers of F32", code="E_TENSOR_SHAPE")
    pairs = zip(_floats(found), CODEBOOKS[FORMATS[quant_type]], strict=True)
    # NaN is not near
    if not all(abs(number - constant) < MAP_TOLERANCE for number, constant in pairs):
        raise _wrong_state(parts.name, f"its quant_map does not hold the numbers of {quant_type}")


def _floats(tensor: TensorInfo) -> tuple[float, ...]:
    data = tensor.read()
    return struct.unpack(f"<{len(data) // 4}f", data)


def _read_state(parts: Parts, suffix: str) -> _State:
    tensor = parts[suffix]
    if tensor.dtype != "U8" or tensor.size_bytes > MAX_STATE_BYTES:
        raise parts.misfit(suffix, f"U8, at most {MAX_STATE_BYTES}")
    state = _parse_state(tensor.read(), tensor.name)
    if suffix != f"{STATE}{state.quant_type}":
        raise _wrong_state(parts.name, f"`{tensor.name}` is of {state.quant_type}")
    return state


def _parse_state(data: bytes, where: str) -> _State:
    """Return what the JSON in ``data`` says; CheckpointRefused when it is not what bitsandbytes
    writes.
    """
    found = parse_object(data, where)
    is_nested = not NESTED_KEYS.isdisjoint(found)
    wanted = KEYS | NESTED_KEYS if is_nested else KEYS
    if found.keys() != wanted:
        raise _wrong_state(where, f"its keys are {sorted(found)}, and not {sorted(wanted)}")
    kind, shape, offset = found["quant_type"], found["shape"], found.get("nested_offset", 0.0)
    checks = {
        "quant_type": isinstance(kind, str) and kind in FORMATS,
        "blocksize": _is_block_size(found["blocksize"]),
        "dtype": isinstance(found["dtype"], str) and found["dtype"] in DTYPES,
        "shape": isinstance(shape, list) and len(shape) == 2 and all(map(_is_side, shape)),
        "nested_blocksize": not is_nested or _is_block_size(found["nested_blocksize"]),
        "nested_dtype": not is_nested or found["nested_dtype"] == "float32",
        "nested_offset": type(offset) in (int, float) and abs(offset) <= LARGEST_OFFSET,
    }
    if wrong := next((key for key, is_right in checks.items() if not is_right), None):
        raise _wrong_state(where, f"its {wrong} cannot be {str(found[wrong])[:60]}")
    nested = found["nested_blocksize"] if is_nested else None
    return _State(kind, found["blocksize"], (shape[0], shape[1]), nested, float(offset))


def _is_block_size(value: object) -> bool:
    return type(value) is int and value in BLOCK_SIZES


def _is_side(value: object) -> bool:
    return type(value) is int and 0 < value < MAX_SIDE


def _wrong_state(where: str, what: str) -> CheckpointRefused:
    return refused(
        "E_QUANT_STATE", f"`{where}` is not what bitsandbytes writes: {what}", BYTES_HINT
    )
