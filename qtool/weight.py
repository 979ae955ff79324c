"""The one in-memory form of a quantized linear weight: `dequantize` and `fake_quantize_input`
define what it means, `quantize` makes one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qtool.codes import (
    FP4_MAX,
    FP4_SCALES,
    FP8_MAX,
    NVFP4_RANGE,
    codebook,
    fp4_values,
    from_fp8,
    look_up,
    mx_scale,
    pack_pairs,
    to_16_bits,
    to_codebook,
    to_fp4,
    to_fp8,
    unpack_pairs,
)
from qtool.errors import UsageError
from qtool.scheme import Activations, Scheme, Weights

PIECE = 1 << 21  # weights in f32 at a time: 8 MB and a few copies, whatever the size of the matrix


@dataclass(frozen=True)
class Activation:
    """How the input is rounded: its format, and for static ones the scale (a scalar, a multiplier)
    and, if asymmetric, the zero point.

    For NVFP4 ``scale`` is the global one, amax / 2688; the scale of each group of 16 is found at
    run time.
    """

    format: Activations
    scale: Tensor | None = None
    zero: Tensor | None = None


@dataclass(frozen=True)
class QuantizedWeight:
    """A linear weight of N outputs and K inputs, in groups of g inputs."""

    data: Tensor
    """The codes. 8 bits: int8 (also for codes of 2, 3, 5, 6 and 7 bits) or float8_e4m3fn, [N, K];
    4 bits: uint8 [N, K/2], the low nibble is the even input: int4 as value + 8, fp4 as its E2M1
    code, or an index of ``codebook``.
    """
    scale: Tensor
    """[N, K/g], [N, 1], or of blocks [N/bn, K/bk], dtype as found; e4m3 means NVFP4, e8m0 MX."""
    scale2: Tensor | None = None
    """f32 [N]: the second-level scale of NVFP4, or a second factor of a scale in f32 (1/127 of
    LLM.int8).
    """
    zero: Tensor | None = None
    """int8 [N, K/g], subtracted from the signed value."""
    perm: Tensor | None = None
    """int32 [K]: column j holds input ``perm[j]``."""
    pre_scale: Tensor | None = None
    """[K], multiplies the input."""
    activation: Activation | None = None
    """How the input is rounded."""
    block: tuple[int, int] | None = None
    """The (outputs, inputs) under one scale, only where they do not divide N and K, so that the
    last block is short.
    """
    codebook: Tensor | None = None
    """f32 [16]: what each 4-bit code stands for before scaling (nf4)."""
    offset: Tensor | None = None
    """[N, K/g], f16 or f32, added after scaling, as in GGUF's types with a minimum; codes then
    count from 0, in uint8 as they are.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """N outputs, K inputs."""
        rows, columns = self.data.shape
        return rows, columns * 2 if self.data.dtype == torch.uint8 else columns

    @property
    def tile(self) -> tuple[int, int]:
        """How many outputs and inputs one scale covers."""
        (rows, columns), (row_tiles, column_tiles) = self.shape, self.scale.shape
        return self.block or (-(-rows // row_tiles), -(-columns // column_tiles))


def dequantize(weight: QuantizedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the weight that ``weight`` stands for, [N, K], its columns in the order of the inputs:
    ``(value - zero) * scale * scale2 + offset``.

    Computed in f32, some rows at a time, then rounded to ``dtype``. ``pre_scale`` is the input's
    affair and is not applied.
    Source: compressed-tensors 0.19 and ModelOpt 0.47, compared in the tests.
    """
    values = torch.empty(weight.shape, dtype=dtype, device=weight.data.device)
    for start, piece in _pieces(weight):
        values[start : start + piece.shape[0]] = _dequantized(piece)
    return (
        values
        if weight.perm is None
        else torch.empty_like(values).index_copy_(1, weight.perm.long().to(values.device), values)
    )


def with_one_scale(weight: QuantizedWeight) -> QuantizedWeight:
    """Return ``weight`` with ``scale2`` multiplied into its f32 scale, for formats and kernels that
    have one scale; dequantized numbers may differ in the last bit of f32. NVFP4 keeps both.
    """
    if weight.scale2 is None or weight.scale.dtype == torch.float8_e4m3fn:
        return weight
    return replace(weight, scale=weight.scale * weight.scale2[:, None], scale2=None)


def _dequantized(weight: QuantizedWeight) -> Tensor:
    (rows, columns), (height, width) = weight.shape, weight.tile
    values = codes_to_values(weight.data, weight.scale.dtype, codebook=weight.codebook)
    scale = weight.scale.float()
    if weight.offset is not None and weight.data.dtype == torch.uint8:
        values += 8  # the codes themselves
    is_nvfp4 = weight.scale.dtype == torch.float8_e4m3fn
    if weight.scale2 is not None and is_nvfp4:
        scale = scale * weight.scale2[:, None]
    if weight.zero is not None:
        values -= spread(weight.zero.float(), columns, width, dim=1)
    values.mul_(spread(spread(scale, columns, width, dim=1), rows, height, dim=0))
    if weight.scale2 is not None and not is_nvfp4:
        values.mul_(weight.scale2[:, None])
    if weight.offset is not None:
        values += spread(weight.offset.float(), columns, width, dim=1)
    return values


def _pieces(weight: QuantizedWeight) -> Iterator[tuple[int, QuantizedWeight]]:
    """Yield (first row, rows from there) that cover ``weight``, each of about `PIECE` weights and
    cut between two scales.
    """
    (rows, columns), (height, width) = weight.shape, weight.tile
    for start, stop in _row_ranges(rows, columns, height):
        zero, scale2, offset = (
            None if part is None else part[start:stop]
            for part in (weight.zero, weight.scale2, weight.offset)
        )
        piece = QuantizedWeight(
            weight.data[start:stop],
            weight.scale[start // height : -(-stop // height)],
            scale2,
            zero,
            block=(height, width),
            codebook=weight.codebook,
            offset=offset,
        )
        yield start, piece


def _row_ranges(rows: int, columns: int, height: int) -> Iterator[tuple[int, int]]:
    step = max(1, PIECE // max(1, columns * height)) * height
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def quantize(tensor: Tensor, scheme: Scheme) -> QuantizedWeight:
    """Round ``tensor`` [N, K], a float of any width, to nearest in ``scheme``: the inverse of
    `dequantize`.

    Scales take the dtype of ``tensor``, f32 for wider ones, and codes are rounded to the scale as
    it is stored. Integers spread over the whole range, 2 * amax / (2^bits - 1) or (max - min) /
    (2^bits - 1) with a zero point; fp8 is amax / 448; NVFP4 has amax / 2688 (with fp8 inputs amax /
    448) and amax / 6 of each group over that; MX scales are `mx_scale`. Half goes to even. Codes
    of a codebook are what bitsandbytes makes of amax, an f32 scale. Static
    activations get no scale: that takes data. Works on any device, some rows at a time.

    Raises: UsageError, when a 4-bit weight has an odd number of inputs, and for IQ4_NL and
        groups with an ``offset``, which `formats.gguf_blocks` rounds to.
    Source: compressed-tensors 0.19, `quantization/utils/helpers.py`.
    """
    weights, (rows, columns) = scheme.weights, tensor.shape
    if weights.offset or weights.format == "iq4_nl":
        raise UsageError("E_SCHEME", f"weights cannot be rounded to {weights}: choose another")
    height, width = weights.block or (1, weights.group_size or columns)
    rounding = _Rounding.of(tensor, scheme)
    whole: list[Tensor | None] = []  # data, scale, zero
    for start, stop in _row_ranges(rows, columns, height):
        parts = rounding.round(tensor[start:stop].float(), height, width)
        if not whole:
            tiles = -(-rows // height)
            whole = [
                None if part is None else part.new_empty(size, part.shape[1])
                for part, size in zip(parts, (rows, tiles, tiles), strict=True)
            ]
        firsts = (start, start // height, start // height)
        for target, part, first in zip(whole, parts, firsts, strict=True):
            if target is not None and part is not None:
                target[first : first + part.shape[0]] = part
    data, scale, zero = whole
    assert data is not None and scale is not None
    scale2 = rounding.scale2
    return QuantizedWeight(
        data,
        scale,
        None if scale2 is None else scale2.expand(rows).contiguous(),
        zero,
        activation=Activation(scheme.activations) if scheme.activations else None,
        block=uneven_block(weights, (rows, columns)),
        codebook=rounding.codebook,
    )


def uneven_block(weights: Weights, shape: tuple[int, int]) -> tuple[int, int] | None:
    """Return the (outputs, inputs) under one scale of a weight [N, K] where they do not divide it,
    else None: `QuantizedWeight.block`.
    """
    height, width = weights.block or (1, weights.group_size or shape[1])
    return (height, width) if shape[0] % height or shape[1] % width else None


@dataclass(frozen=True)
class _Rounding:
    """How the rows of one weight are rounded, wherever they stand in it."""

    weights: Weights
    dtype: torch.dtype
    """Of scales that are floats of 16 or 32 bits."""
    amax: Tensor | None
    """Of the whole weight, f32 scalar, where one scale covers all of it."""
    scale2: Tensor | None
    """f32 scalar, over e4m3 scales."""
    codebook: Tensor | None
    """What codes stand for, f32 [16], where the format has one."""

    @classmethod
    def of(cls, tensor: Tensor, scheme: Scheme) -> _Rounding:
        """Look at the whole ``tensor``, if its scales depend on all of it."""
        weights, amax, scale2 = scheme.weights, None, None
        if weights.granularity == "tensor" or weights.scale == "e4m3":
            low, high = torch.aminmax(tensor)
            amax = torch.maximum(low.float().abs(), high.float().abs())
        if weights.scale == "e4m3" and amax is not None:
            # kernels then unpack fp4 to fp8, so scale * code stays below 448
            over_fp8 = scheme.activations and scheme.activations.format == "fp8"
            largest_product = amax.new_tensor(FP8_MAX if over_fp8 else NVFP4_RANGE)
            scale2 = torch.where(amax > 0, to_16_bits(amax) / largest_product, 1.0)
        is_16_bits = tensor.dtype in (torch.bfloat16, torch.float16)
        values = codebook(weights.format, tensor.device)
        return cls(weights, tensor.dtype if is_16_bits else torch.float32, amax, scale2, values)

    def round(self, x: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return (data, scale, zero) of ``x``, f32 [R, K], in tiles of ``height`` x ``width``."""
        rows, columns = x.shape
        padded = torch.nn.functional.pad(x, (0, -columns % width, 0, -rows % height))
        tiles = padded.reshape(padded.shape[0] // height, height, padded.shape[1] // width, width)
        low = None if self.weights.symmetric else tiles.amin((1, 3)).clamp(max=0)
        scale, step = self._scales(tiles, low)
        step = step[:, None, :, None]
        if self.codebook is None:
            codes, zero = self._codes(tiles / step, low, step)
        else:  # a product with the reciprocal, as in bitsandbytes
            ratio = (tiles * (1 / step.clamp(min=1e-38))).clamp_(-1, 1)
            codes, zero = to_codebook(ratio, self.codebook), None
        data = codes.flatten(2).flatten(0, 1)[:rows, :columns].contiguous()
        if self.weights.bits == 4:
            is_int = data.dtype == torch.int8
            data = pack_pairs((data + 8).view(torch.uint8) if is_int else data)
        return data, scale, zero

    def _scales(self, tiles: Tensor, low: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the scales as they are stored, and the step between two codes, f32.

        Args:
            low: the smallest number of each tile, 0 at most, where codes have zero points.
        """
        weights = self.weights
        if low is not None:
            spans = tiles.amax((1, 3)).clamp(min=0) - low
        elif weights.granularity == "tensor" and self.amax is not None:
            spans = self.amax.expand(tiles.shape[0], 1)
        else:
            spans = tiles.abs().amax((1, 3))
        if self.codebook is not None:
            return spans, spans
        largest_code = {"fp8": FP8_MAX, "fp4": FP4_MAX}.get(weights.format)
        if largest_code is None:
            largest_code = (2**weights.bits - 1) / (2 if weights.symmetric else 1)
        # CUDA multiplies by the reciprocal of a Python number, and the CPU divides
        limit = tiles.new_tensor(largest_code)
        if self.scale2 is not None:
            scale = to_fp8((spans / (limit * self.scale2)).clamp(min=2**-9))
            return scale, scale.float() * self.scale2
        if weights.scale == "e8m0":
            step = mx_scale(spans, largest_code)
            return step.to(torch.float8_e8m0fnu), step
        smallest = torch.finfo(self.dtype).smallest_normal * torch.finfo(self.dtype).eps
        scale = torch.where(spans > 0, spans / limit, 1.0).to(self.dtype).clamp(min=smallest)
        return scale, scale.float()

    def _codes(
        self, ratio: Tensor, low: Tensor | None, step: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Return the codes of ``ratio``, tiles in steps, which it overwrites; and zero points."""
        if self.weights.format == "fp8":
            return to_fp8(ratio), None
        if self.weights.format == "fp4":
            return to_fp4(ratio), None
        top, zero = 2 ** (self.weights.bits - 1), None  # integers run from -top to top - 1
        if low is not None:
            zero = (-top - low / step[:, 0, :, 0]).round().clamp(-top, top - 1)
            ratio = ratio.round_().add_(zero[:, None, :, None])
            zero = zero.to(torch.int8)
        return ratio.round_().clamp_(-top, top - 1).to(torch.int8), zero


def fake_quantize_input(
    x: Tensor,
    activation: Activations,
    static_scale: Tensor | None = None,
    static_zero: Tensor | None = None,
) -> Tensor:
    """Return ``x`` [..., K] rounded to ``activation`` and back, in its own dtype.

    ``static_scale`` is the calibrated multiplier; a missing one is found from ``x`` over all
    tokens. Integers round half to even and dynamic ones scale by amax / 127, as engines do
    (compressed-tensors simulates amax / 127.5). MX scales follow compressed-tensors: a group whose
    amax has a mantissa of 1.75 or more takes the next power of two.
    """
    groups, columns = x.float(), x.shape[-1]
    if activation.granularity == "group":
        size = activation.group_size or columns
        padded = torch.nn.functional.pad(groups, (0, -columns % size))  # the last may be short
        groups = padded.reshape(*x.shape[:-1], -1, size)
    over = tuple(range(x.dim())) if activation.granularity == "tensor" else -1
    is_int = activation.format.startswith("int")
    if is_int and not activation.symmetric and static_zero is None:
        rounded = _round_to_range(groups, over, int(largest(activation)))
    else:
        scale = _input_scale(x, groups.abs().amax(over, keepdim=True), activation, static_scale)
        scale = torch.where(scale > 0, scale, 1.0)
        rounded = _round_by_scale(groups, scale, activation, static_zero)
    return rounded.reshape(*x.shape[:-1], -1)[..., :columns].to(x.dtype)


def _input_scale(
    x: Tensor, amax: Tensor, activation: Activations, static_scale: Tensor | None
) -> Tensor:
    """Return the scale of inputs ``x``; ``amax``: of each part that shares one."""
    if activation.scale == "e4m3":
        scale2 = static_scale
        if scale2 is None:
            scale2 = divided(x.float().abs().amax(), NVFP4_RANGE)
        return to_fp8(amax / (FP4_MAX * scale2)).float() * scale2
    if activation.scale == "e8m0":
        return mx_scale(amax, FP4_MAX if activation.format == "fp4" else FP8_MAX)
    if static_scale is not None:
        return static_scale
    return divided(amax, largest(activation))


def _round_by_scale(
    groups: Tensor, scale: Tensor, activation: Activations, zero: Tensor | None
) -> Tensor:
    if activation.format == "fp8":
        return from_fp8(to_fp8(groups / scale)) * scale
    if activation.format == "fp4":
        return codes_to_values(to_fp4(groups / scale), torch.float8_e4m3fn, packed=False) * scale
    top, shift = int(largest(activation)), 0.0 if zero is None else zero
    return ((groups / scale).round() + shift).clamp(-top - 1, top).sub(shift) * scale


def _round_to_range(groups: Tensor, over: int | tuple[int, ...], top: int) -> Tensor:
    """Round to integers from ``-top - 1`` to ``top`` with the zero point that the range needs."""
    low = groups.amin(over, keepdim=True).clamp(max=0)
    high = groups.amax(over, keepdim=True).clamp(min=0)
    scale = divided(high - low, 2 * top + 1).clamp(min=torch.finfo(torch.float32).tiny)
    zero = (-top - 1 - low / scale).round()
    return ((groups / scale).round() + zero).clamp(-top - 1, top).sub(zero) * scale


def divided(x: Tensor, number: float) -> Tensor:
    """Return ``x / number``, rounded once: by a Python number CUDA multiplies with the reciprocal,
    and codes between two others then differ.
    """
    return x / torch.full_like(x, number)


def largest(activation: Activations) -> float:
    """Return the largest number of ``activation``'s format."""
    return {"fp8": FP8_MAX, "fp4": FP4_MAX}.get(activation.format) or 2.0 ** (
        int(activation.format[3:]) - 1
    ) - 1


def codes_to_values(
    data: Tensor,
    scale_dtype: torch.dtype,
    *,
    packed: bool = True,
    codebook: Tensor | None = None,
) -> Tensor:
    """Return the signed numbers, f32 [N, K], that ``data`` of a `QuantizedWeight` stands for before
    scaling.
    """
    if data.dtype == torch.float8_e4m3fn:
        return from_fp8(data)
    if data.dtype != torch.uint8:
        return data.float()
    codes = unpack_pairs(data) if packed else data
    if codebook is not None:
        return look_up(codebook, codes)
    if scale_dtype in FP4_SCALES:
        return look_up(fp4_values(data.device), codes)
    return codes.float() - 8


def spread(entries: Tensor, size: int, step: int, *, dim: int) -> Tensor:
    """Repeat each of the entries along ``dim`` ``step`` times, to ``size`` in all; the last one may
    cover less.
    """
    if entries.shape[dim] in (1, size):
        return entries
    return entries.repeat_interleave(step, dim=dim).narrow(dim, 0, size)
