"""Rounds weights to the blocks of GGUF's quantized types.

Source: ggml, `ggml-quants.c`; the Python package gguf 0.19, `quants.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from qtool.codes import FP4_LIMITS
from qtool.errors import CheckpointRefused
from qtool.formats.gguf_blocks import Blocks, BlockType, pack, split_last

PIECE = 1 << 18  # weights that are rounded at a time: 1 MB in f32, and a few copies
MIN_AMAX = 1e-15  # a group whose numbers are all smaller is 0


def quantize(type: BlockType, tensor: Tensor) -> Tensor:
    """Round ``tensor`` [N, K], floats of any width, to blocks: uint8 [N, `BlockType.row_bytes`].

    Bytes are those of gguf 0.19 where it rounds (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, MXFP4). IQ4_NL and
    K types look for the scale with the least weighted square error, as llama.cpp does without an
    importance matrix. Works on some rows at a time.

    Raises: CheckpointRefused, when a number is not finite, or a scale is too large for f16.
    """
    rows, columns = tensor.shape
    step = max(1, PIECE // max(1, columns))
    packed = torch.empty(rows, type.row_bytes(columns), dtype=torch.uint8, device=tensor.device)
    for start in range(0, rows, step):
        numbers = tensor[start : start + step].float()
        blocks = _ROUNDING[type.name](type, numbers)
        scales = (each for each in (blocks.d, blocks.low) if each is not None)
        fits = all(bool(each.float().isfinite().all()) for each in scales)
        if not fits or not bool(numbers.isfinite().all()):
            raise CheckpointRefused(
                "E_VALUES",
                f"the weights hold NaN, infinity, or numbers for which the scales of {type.name} "
                "are too large",
                hint="`qtool inspect --deep` lists all of them; --type F32 keeps large numbers",
            )
        packed[start : start + step] = pack(blocks)
    return packed


def _round_to_amax(type: BlockType, x: Tensor) -> Blocks:
    """Q4_0 and Q5_0: the number of the largest magnitude becomes the most negative code."""
    groups = split_last(x, -1, type.inputs)
    index = groups.abs().argmax(dim=-1, keepdim=True)
    d = groups.gather(-1, index) / -type.zero
    codes = _truncate(groups * _inverse(d) + (type.zero + 0.5), 2 * type.zero - 1)
    return Blocks(type, codes.flatten(1), _to_f16(d))


def _round_to_range(type: BlockType, x: Tensor) -> Blocks:
    """Q4_1 and Q5_1: codes from the smallest to the largest number."""
    groups = split_last(x, -1, type.inputs)
    top = 2**type.bits - 1
    low, high = groups.aminmax(dim=-1, keepdim=True)
    d = (high - low) / torch.full_like(low, top)
    codes = _truncate((groups - low) * _inverse(d) + 0.5, top)
    return Blocks(type, codes.flatten(1), _to_f16(d), _to_f16(low))


def _round_to_bytes(type: BlockType, x: Tensor) -> Blocks:
    """Q8_0: amax / 127, halves away from zero."""
    groups = split_last(x, -1, type.inputs)
    d = groups.abs().amax(dim=-1, keepdim=True)
    d = d / torch.full_like(d, 127)
    ratio = groups * _inverse(d)
    codes = ratio.abs().add_(0.5).floor_().copysign_(ratio).to(torch.int8)
    return Blocks(type, codes.view(torch.uint8).flatten(1), _to_f16(d))


def _round_to_mxfp4(type: BlockType, x: Tensor) -> Blocks:
    """A power of two so that amax lies in [4, 8) steps: half of that range saturates at 6."""
    groups = split_last(x, -1, type.inputs)
    amax = groups.abs().amax(dim=-1, keepdim=True)
    exponent = torch.where(amax > 0, amax.log2().floor() - 2, -127).clamp(-127, 127)
    ratio = groups / torch.exp2(exponent)
    # a tie goes to the smaller magnitude
    codes = torch.bucketize(ratio.abs(), ratio.new_tensor(FP4_LIMITS)).to(torch.uint8)
    codes |= ((ratio < 0) & (codes > 0)).to(torch.uint8) << 3
    scale = (exponent.squeeze(-1) + 127).to(torch.uint8).view(torch.float8_e8m0fnu)
    return Blocks(type, codes.flatten(1), scale)


def _round_to_codebook(type: BlockType, x: Tensor) -> Blocks:
    """IQ4_NL: the best of some scales around the one that makes the largest magnitude -127."""
    groups = split_last(x, -1, type.inputs)
    values = x.new_tensor(type.codebook)
    limits = (values[1:] + values[:-1]) / 2

    def nearest(ratio: Tensor) -> Tensor:
        return torch.bucketize(ratio, limits, right=True)

    steps = [values[0].item() + step for step in range(-7, 8)]
    d = _fit_scale(groups, steps, lambda ratio: values[nearest(ratio)])
    codes = nearest(groups * _inverse(d)).to(torch.uint8)
    return Blocks(type, codes.flatten(1), _to_f16(d))


def _round_symmetric(type: BlockType, x: Tensor) -> Blocks:
    """Q3_K and Q6_K: a scale for each group, then integers of them, then codes."""
    groups = split_last(x, -1, type.group)
    steps = [-type.zero + step / 10 for step in range(-9, 10)]
    limits = {"min": -type.zero, "max": type.zero - 1}
    scale = _fit_scale(groups, steps, lambda ratio: ratio.round().clamp(**limits)).squeeze(-1)
    per_block = split_last(scale, x.shape[1] // type.inputs, -1)
    largest = per_block.gather(-1, per_block.abs().argmax(dim=-1, keepdim=True))
    top = 32 if type.bits == 3 else 128
    d = _to_f16(largest / -top)
    counts = (per_block * _inverse(largest / -top)).round().clamp(-top, top - 1)
    step = (d.float()[..., None] * counts).flatten(1)[..., None]
    codes = (groups * _inverse(step)).round().clamp(**limits) + type.zero
    return Blocks(
        type, codes.to(torch.uint8).flatten(1), d, scales=counts.to(torch.int8).flatten(1)
    )


def _round_affine(type: BlockType, x: Tensor) -> Blocks:
    """Q2_K, Q4_K and Q5_K: scale and minimum of each group, then integers of them, then codes."""
    groups = split_last(x, -1, type.group)
    scale, low = _fit_affine(groups, 2**type.bits - 1, _weights(type, groups))
    top = 15 if type.bits == 2 else 63
    blocks = x.shape[1] // type.inputs
    d, scales = _in_steps(split_last(scale, blocks, -1), top)
    dmin, mins = _in_steps(split_last(low, blocks, -1), top)
    step = (d.float()[..., None] * scales).flatten(1)[..., None]
    least = (dmin.float()[..., None] * mins).flatten(1)[..., None]
    codes = ((groups + least) * _inverse(step)).round().clamp(0, 2**type.bits - 1)
    return Blocks(
        type,
        codes.to(torch.uint8).flatten(1),
        d,
        dmin,
        scales.to(torch.int8).flatten(1),
        mins.to(torch.int8).flatten(1),
    )


def _in_steps(numbers: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Return a step, f16 [N, B], and how many of them each of ``numbers`` [N, B, G] is, up to
    ``top``.
    """
    largest = numbers.amax(dim=-1, keepdim=True)
    counts = (numbers * _inverse(largest / top)).round().clamp(0, top)
    return _to_f16(largest / top), counts


def _weights(type: BlockType, groups: Tensor) -> Tensor:
    """Return how much the square error of each number counts."""
    if type.bits == 2:
        return groups.abs()
    return groups.square().mean(dim=-1, keepdim=True).sqrt() + groups.abs()


def _fit_scale(groups: Tensor, steps: list[float], round: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the scale [N, G, 1] of ``groups`` [N, G, n] with the least square error, weighted by
    the squares of the numbers.

    Args:
        steps: what the number of the largest magnitude is tried as.
        round: gives the number that a code stands for.
    """
    index = groups.abs().argmax(dim=-1, keepdim=True)
    largest = groups.gather(-1, index)
    inverse = _inverse(torch.where(largest.abs() < MIN_AMAX, 0, largest))
    weights = groups.square()
    weighted = weights * groups
    best_scale = torch.where(inverse == 0, 0, largest / steps[0])
    best_gain = torch.full_like(largest, -1)
    for step in steps:
        codes = round(groups * (inverse * step))
        product = (weighted * codes).sum(dim=-1, keepdim=True)
        norm = codes.square_().mul_(weights).sum(dim=-1, keepdim=True)
        scale = torch.where(norm > 0, product / norm, 0)
        gain = scale * product
        best_scale = torch.where(gain > best_gain, scale, best_scale)
        best_gain = torch.maximum(gain, best_gain)
    return best_scale


def _fit_affine(groups: Tensor, top: int, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return scales and minima [N, G], none negative, so that ``code * scale - minimum`` with codes
    0 to ``top`` comes nearest to ``groups`` [N, G, n], by ``weights``.

    Codes are made with some scales around range / top; for each, scale and minimum are those of
    the least square error.
    """
    low, high = groups.aminmax(dim=-1, keepdim=True)
    low = low.clamp(max=0)
    inverse = _inverse(high - low)
    weighted = weights * groups
    total = partial(torch.sum, dim=-1)
    sum_w, sum_x = total(weights), total(weighted)
    best_scale = ((high - low) / top).squeeze(-1)
    best_low = low.squeeze(-1).clone()
    best_gain = torch.full_like(sum_w, -torch.inf)
    steps = range(-5, 11) if top == 3 else range(-10, 11)
    for step in steps:
        codes = ((groups - low) * (inverse * (top + step / 10))).round_().clamp_(0, top)
        sum_xl = total(weighted * codes)
        sum_l = total(codes_w := weights * codes)
        sum_l2 = total(codes_w.mul_(codes))
        determinant = sum_w * sum_l2 - sum_l.square()
        usable = determinant > 0
        scale = torch.where(usable, (sum_w * sum_xl - sum_x * sum_l) / determinant, 0)
        least = torch.where(usable, (sum_l2 * sum_x - sum_l * sum_xl) / determinant, -torch.inf)
        is_above = least > 0
        scale = torch.where(is_above, sum_xl / sum_l2, scale)
        least = torch.where(is_above, 0, least)
        gain = scale * sum_xl + least * sum_x
        better = (gain > best_gain) & usable & (scale > 0)
        best_scale = torch.where(better, scale, best_scale)
        best_low = torch.where(better, least, best_low)
        best_gain = torch.where(better, gain, best_gain)
    return best_scale, -best_low


def _inverse(numbers: Tensor) -> Tensor:
    return torch.where(numbers == 0, 0, 1 / numbers)


def _truncate(numbers: Tensor, top: int) -> Tensor:
    return numbers.clamp_(0, top).to(torch.uint8)


def _to_f16(numbers: Tensor) -> Tensor:
    return numbers.squeeze(-1).to(torch.float16)


_ROUNDING: Mapping[str, Callable[[BlockType, Tensor], Blocks]] = {
    "Q4_0": _round_to_amax,
    "Q4_1": _round_to_range,
    "Q5_0": _round_to_amax,
    "Q5_1": _round_to_range,
    "Q8_0": _round_to_bytes,
    "Q2_K": _round_affine,
    "Q3_K": _round_symmetric,
    "Q4_K": _round_affine,
    "Q5_K": _round_affine,
    "Q6_K": _round_symmetric,
    "IQ4_NL": _round_to_codebook,
    "MXFP4": _round_to_mxfp4,
}
