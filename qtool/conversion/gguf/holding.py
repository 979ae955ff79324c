"""Which blocks of GGUF hold a quantized weight as it is: codes and scales are kept."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qtool.codes import FP4_SCALES, unpack_pairs
from qtool.formats.gguf_blocks import TYPES, Blocks, BlockType
from qtool.weight import QuantizedWeight, spread

FLOAT_SCALES = (torch.float16, torch.bfloat16, torch.float32)
ORDER = ("Q4_0", "Q4_1", "Q5_0", "Q8_0", "MXFP4")
"""The types that hold weights of other formats, the smallest first."""
INPUTS = 32


def reason_not_held(
    type: BlockType, weight: QuantizedWeight, bits: int, *, rounds_scales: bool = False
) -> str | None:
    """Return the constraint that keeps blocks of ``type`` from holding ``weight``; None when they
    can. Of the data only scales and zero points are looked at; the codes may be without data.

    Args:
        bits: of one code.
        rounds_scales: whether scales may be rounded to 16 bits.
    """
    return (
        _format_reason(weight)
        or _layout_reason(weight)
        or _numbers_reason(type, weight, bits, rounds_scales)
    )


def _format_reason(weight: QuantizedWeight) -> str | None:
    if weight.data.is_floating_point():
        return "format: GGUF has no blocks of fp8"
    if weight.scale2 is not None:
        return "format: NVFP4 has scales in two levels, and qtool writes no such blocks"
    if weight.offset is not None:
        return "offset: its minima are kept in GGUF's own blocks alone"
    if weight.codebook is not None:
        return "format: its codes are indices of a codebook that no type of GGUF has"
    return None


def _layout_reason(weight: QuantizedWeight) -> str | None:
    if weight.perm is not None:
        return "act-order: its groups are scattered over the inputs, and blocks lie in order"
    if weight.pre_scale is not None:
        return "pre_quant_scale: its inputs are multiplied by a factor, which GGUF has no place for"
    return _grouping_reason(weight)


def _grouping_reason(weight: QuantizedWeight) -> str | None:
    columns = weight.shape[1]
    height, width = weight.tile
    if columns % INPUTS:
        return f"group_size: {INPUTS} does not divide {columns} inputs"
    if height > 1 and weight.scale.shape[0] > 1:
        return f"granularity: a scale covers {height} outputs, and a block lies in one"
    if width % INPUTS and width < columns:
        return f"group_size: {width} is not a multiple of {INPUTS}, the inputs of a block"
    return None


def _numbers_reason(
    type: BlockType, weight: QuantizedWeight, bits: int, rounds_scales: bool
) -> str | None:
    if type.name == "MXFP4":
        return _mxfp4_reason(weight)
    if weight.scale.dtype not in FLOAT_SCALES:
        return f"format: {type.name} holds integers with scales of 16 bits"
    reason = _codes_reason(type, weight, bits)
    return reason or _scales_reason(type, weight, bits, rounds_scales)


def _mxfp4_reason(weight: QuantizedWeight) -> str | None:
    if weight.data.dtype != torch.uint8 or weight.scale.dtype != torch.float8_e8m0fnu:
        return "format: MXFP4 holds fp4 with scales that are powers of two"
    return None if weight.tile[1] == INPUTS else "group_size: MXFP4 has groups of 32 inputs"


def _scales_reason(
    type: BlockType, weight: QuantizedWeight, bits: int, rounds_scales: bool
) -> str | None:
    fits = _fits_f16 if rounds_scales else _is_f16
    if not fits(weight.scale):
        return "scale: float16, which GGUF's blocks have, cannot hold it exactly"
    if type.has_offset and not fits(_offset(weight, bits)):
        return f"zero points: float16, which {type.name} has, cannot hold zero * scale exactly"
    return None


def _codes_reason(type: BlockType, weight: QuantizedWeight, bits: int) -> str | None:
    top = 2 ** (bits - 1)
    if type.has_offset:
        if bits > type.bits or weight.zero is None:
            return f"bits: {type.name} is for codes of {type.bits} bits with a minimum"
        return None
    low, high = (-top, top - 1) if weight.zero is None else (1 - 2 * top, 2 * top - 1)
    if low < _range(type)[0] or high > _range(type)[1]:
        return f"bits: numbers from {low} to {high} do not fit {type.name}"
    return None


def blocks_of(type: BlockType, weight: QuantizedWeight, bits: int) -> Blocks:
    """Return the blocks of ``type`` that hold ``weight``, for which `reason_not_held` was None."""
    rows, columns = weight.shape
    count = columns // INPUTS

    def per_block(entries: Tensor) -> Tensor:
        width = min(weight.tile[1], columns)
        return spread(entries, count, width // INPUTS, dim=1).expand(rows, count)

    if type.name == "MXFP4":
        scale = per_block(weight.scale.view(torch.uint8))
        codes = unpack_pairs(weight.data)
        return Blocks(type, codes, scale.contiguous().view(torch.float8_e8m0fnu))
    d = per_block(weight.scale.to(torch.float16))
    values = weight.data
    if values.dtype == torch.uint8:
        values = (unpack_pairs(values) - 8).view(torch.int8)
    if type.has_offset:
        codes = values + 2 ** (bits - 1)
        low = per_block(_offset(weight, bits).to(torch.float16))
        return Blocks(type, codes.view(torch.uint8), d, low)
    if weight.zero is not None:
        values = values - spread(weight.zero, columns, weight.tile[1], dim=1)
    return Blocks(type, (values + type.zero).view(torch.uint8), d)


def rows_of(weight: QuantizedWeight, rows: Tensor) -> QuantizedWeight:
    """Return the outputs ``rows``, int64 [R], of ``weight``, whose scales cover one output each or
    all of them.
    """

    def some(part: Tensor | None) -> Tensor | None:
        return part if part is None or part.shape[0] == 1 else part[rows]

    scale = some(weight.scale)
    assert scale is not None
    return replace(
        weight,
        data=weight.data[rows],
        scale=scale,
        scale2=some(weight.scale2),
        zero=some(weight.zero),
        offset=some(weight.offset),
    )


def held_by(
    weight: QuantizedWeight, bits: int, *, rounds_scales: bool = False
) -> tuple[list[str], str]:
    """Return the types that hold ``weight``, the smallest first, and the reason why the most
    likely one does not.
    """
    reasons = {
        name: reason_not_held(TYPES[name], weight, bits, rounds_scales=rounds_scales)
        for name in ORDER
    }
    held = [name for name, reason in reasons.items() if reason is None]
    return held, reasons[_likely(weight, bits)] or ""


def _likely(weight: QuantizedWeight, bits: int) -> str:
    """Return the type that ``weight`` is nearest to."""
    if weight.scale.dtype in FP4_SCALES:
        return "MXFP4"
    if bits > 4:
        return "Q8_0"
    return "Q4_0" if weight.zero is None else "Q5_0"


def _range(type: BlockType) -> tuple[int, int]:
    top = 2 ** (type.bits - 1)
    return -top, top - 1


def _offset(weight: QuantizedWeight, bits: int) -> Tensor:
    """Return what code 0 stands for in each group, f32: Q4_1 adds it."""
    assert weight.zero is not None
    lowest = torch.full_like(weight.scale, 2.0 ** (bits - 1), dtype=torch.float32)
    return -(weight.zero.float() + lowest) * weight.scale.float()


def _is_f16(numbers: Tensor) -> bool:
    numbers = numbers.float()
    rounded = numbers.to(torch.float16).float()
    return bool((rounded == numbers).all()) and bool(rounded.isfinite().all())


def _fits_f16(numbers: Tensor) -> bool:
    """Whether rounding to 16 bits changes no number by more than one in 2048."""
    limits = torch.finfo(torch.float16)
    magnitude = numbers.float().abs()
    in_range = (magnitude >= limits.tiny) & (magnitude <= limits.max)
    return bool((in_range | (numbers.to(torch.float16).float() == numbers.float())).all())
