"""The one in-memory form of a quantized linear weight, and what it means: `dequantize` and `fake_quantize_input` are the definitions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.errors import UsageError
from qtool.scheme import Activations

FP8_MAX = 448.0
FP4_MAX = 6.0
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
FP4_LIMITS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # between neighbouring magnitudes; a tie goes to the even code
FP4_SCALES = (torch.float8_e4m3fn, torch.float8_e8m0fnu)  # uint8 data with such scales is fp4, with others int4


@dataclass(frozen=True)
class Activation:
    """How the input is rounded: its format, and for static ones the scale (f32 scalar, a multiplier) and, if asymmetric, the zero point.

    For NVFP4 ``scale`` is the global one, amax / 2688; the scale of each group of 16 is found at run time.
    """

    format: Activations
    scale: Tensor | None = None
    zero: Tensor | None = None


@dataclass(frozen=True)
class QuantizedWeight:
    """A linear weight of N outputs and K inputs, in groups of g inputs.

    ``data``: 8 bits: int8 (also for 2, 3, 5, 6, 7 bit codes) or float8_e4m3fn [N, K]; 4 bits: uint8 [N, K/2], the low nibble is the even input,
    int4 as value + 8, fp4 as its E2M1 code. ``scale``: [N, K/g], [N, 1], or blocks [N/bn, K/bk], dtype as found; e4m3 means NVFP4, e8m0 MX.
    ``scale2``: f32 [N], NVFP4's second-level multiplier. ``zero``: int8 [N, K/g], subtracted from the signed value. ``perm``: int32 [K], column j
    holds input ``perm[j]``. ``pre_scale``: [K], multiplies the input. ``activation``: how the input is rounded.
    """

    data: Tensor
    scale: Tensor
    scale2: Tensor | None = None
    zero: Tensor | None = None
    perm: Tensor | None = None
    pre_scale: Tensor | None = None
    activation: Activation | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """N outputs, K inputs."""
        rows, columns = self.data.shape
        return rows, columns * 2 if self.data.dtype == torch.uint8 else columns


def dequantize(weight: QuantizedWeight) -> Tensor:
    """Return the weight that ``weight`` stands for, f32 [N, K], its columns in the order of the inputs: ``(value - zero) * scale * scale2``.

    ``pre_scale`` is the input's affair and is not applied. Source: compressed-tensors 0.19 and ModelOpt 0.47, compared in the tests.
    """
    rows, columns = weight.shape
    values = codes_to_values(weight.data, weight.scale.dtype)
    scale = weight.scale.float()
    if weight.scale2 is not None:
        scale = scale * weight.scale2[:, None]
    if scale.shape[0] != rows:  # blocks
        scale = spread(scale, rows, dim=0, short_last=True)
        scale = spread(scale, columns, dim=1, short_last=True)
    else:
        scale = spread(scale, columns, dim=1)
    if weight.zero is not None:
        values = values - spread(weight.zero.float(), columns, dim=1)
    values = values * scale
    if weight.perm is None:
        return values
    return torch.empty_like(values).index_copy_(1, weight.perm.long(), values)


def fake_quantize_input(x: Tensor, activation: Activations, static_scale: Tensor | None = None, static_zero: Tensor | None = None) -> Tensor:
    """Return ``x`` [..., K] rounded to ``activation`` and back, in its own dtype.

    ``static_scale`` is the calibrated multiplier; a missing one is found from ``x`` over all tokens. Integers round half to even and dynamic
    ones scale by amax / 127, as engines do (compressed-tensors simulates amax / 127.5). MX scales follow compressed-tensors: a group whose
    amax has a mantissa of 1.75 or more takes the next power of two.
    """
    groups = x.float()
    if activation.granularity == "group":
        groups = groups.reshape(*x.shape[:-1], -1, activation.group_size or x.shape[-1])
    over = tuple(range(x.dim())) if activation.granularity == "tensor" else -1
    amax = groups.abs().amax(over, keepdim=True)
    if activation.scale == "e4m3":
        scale2 = static_scale if static_scale is not None else x.float().abs().amax() / (FP8_MAX * FP4_MAX)
        scale = to_fp8(amax / (FP4_MAX * scale2)).float() * scale2
    elif activation.scale == "e8m0":
        scale = mx_scale(amax, FP4_MAX if activation.format == "fp4" else FP8_MAX)
    elif static_scale is not None:
        scale = static_scale
    else:
        scale = amax / largest(activation)
    scale = torch.where(scale > 0, scale, 1.0)
    if activation.format == "fp8":
        rounded = to_fp8(groups / scale).float() * scale
    elif activation.format == "fp4":
        rounded = codes_to_values(to_fp4(groups / scale), torch.float8_e4m3fn, packed=False) * scale
    else:
        top, zero = int(largest(activation)), 0.0 if static_zero is None else static_zero
        if not activation.symmetric and static_zero is None:
            low, high = groups.amin(over, keepdim=True).clamp(max=0), groups.amax(over, keepdim=True).clamp(min=0)
            scale = ((high - low) / (2 * top + 1)).clamp(min=torch.finfo(torch.float32).tiny)
            zero = (-top - 1 - low / scale).round()
        rounded = ((groups / scale).round() + zero).clamp(-top - 1, top).sub(zero) * scale
    return rounded.reshape(x.shape).to(x.dtype)


def largest(activation: Activations) -> float:
    """Return the largest number of ``activation``'s format."""
    return {"fp8": FP8_MAX, "fp4": FP4_MAX}.get(activation.format) or 2.0 ** (int(activation.format[3:]) - 1) - 1


def to_fp8(x: Tensor) -> Tensor:
    """Return ``x`` as float8_e4m3fn, saturated: older casts make NaN of what is beyond 464."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def to_fp4(x: Tensor) -> Tensor:
    """Return the E2M1 codes nearest to ``x``, uint8 of the same shape, ties to even, saturated at 6."""
    magnitude = x.abs()
    code = torch.zeros_like(x, dtype=torch.uint8)
    for index, limit in enumerate(FP4_LIMITS):
        code += magnitude >= limit if index % 2 else magnitude > limit
    return code | (x.signbit().to(torch.uint8) << 3)


def mx_scale(amax: Tensor, largest: float) -> Tensor:
    """Return the power of two that compressed-tensors scales a group of ``amax`` by, for elements up to ``largest`` (6 or 448), f32."""
    mantissa, exponent = torch.frexp(amax)  # amax = mantissa * 2^exponent, mantissa in [0.5, 1)
    exponent = exponent - 1 + (mantissa >= 1.75 / 2) - int(math.log2(largest))
    return torch.where(amax > 0, torch.exp2(exponent.clamp(-127, 127).float()), 1.0)


def codes_to_values(data: Tensor, scale_dtype: torch.dtype, *, packed: bool = True) -> Tensor:
    """Return the signed numbers, f32 [N, K], that ``data`` of a `QuantizedWeight` stands for before scaling."""
    if data.dtype != torch.uint8:
        return data.float()
    codes = unpack_pairs(data) if packed else data
    if scale_dtype in FP4_SCALES:
        return torch.tensor(FP4_VALUES, device=data.device)[codes.int()]
    return codes.float() - 8


def pack_pairs(codes: Tensor) -> Tensor:
    """Pack 4-bit ``codes``, uint8 [N, K], into [N, K/2]: the low nibble is the even column. UsageError when K is odd."""
    if codes.shape[-1] % 2:
        raise UsageError("E_SHAPE", f"4-bit weights of {codes.shape[-1]} inputs cannot be paired into bytes")
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def unpack_pairs(data: Tensor) -> Tensor:
    """Unpack uint8 [N, K/2] into codes 0..15, uint8 [N, K]."""
    return torch.stack((data & 15, data >> 4), dim=-1).flatten(-2)


def spread(scale: Tensor, size: int, *, dim: int, short_last: bool = False) -> Tensor:
    """Repeat each of the entries of ``scale`` along ``dim`` so that they cover ``size``; with ``short_last`` the last may cover less."""
    count = scale.shape[dim]
    step = -(-size // count)
    if short_last or size % count:  # engines and libraries cut by powers of two
        step = next((2**bits for bits in range(size.bit_length() + 1) if -(-size // 2**bits) == count), step)
    return scale if count == size else scale.repeat_interleave(step, dim=dim).narrow(dim, 0, size)
