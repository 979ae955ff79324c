"""Numbers as codes of 4 and 8 bits: floats, codebooks, and pairs of codes in a byte (torch)."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from qtool.errors import UsageError
from qtool.scheme import CODEBOOKS

FP8_MAX = 448.0
FP4_MAX = 6.0
NVFP4_RANGE = FP8_MAX * FP4_MAX
FP4_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP4_VALUES = (*FP4_MAGNITUDES, *(-magnitude for magnitude in FP4_MAGNITUDES))  # of each code
# between neighbouring magnitudes; a tie goes to the even code
FP4_LIMITS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
# uint8 data with such scales is fp4, with others int4
FP4_SCALES = (
    torch.float8_e4m3fn,
    torch.float8_e8m0fnu,
)


def to_fp8(x: Tensor) -> Tensor:
    """Return ``x`` as float8_e4m3fn, saturated: older casts make NaN of what is beyond 464."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def from_fp8(codes: Tensor) -> Tensor:
    """Return float8_e4m3fn ``codes`` as f32.

    On a CPU they are looked up, in a quarter of the time: torch converts them one by one.
    """
    if codes.device.type != "cpu":
        return codes.float()
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return look_up(values, codes.view(torch.uint8))


def to_fp4(x: Tensor) -> Tensor:
    """Return the E2M1 codes nearest to ``x``, uint8 of the same shape, ties to even, saturated at
    6.
    """
    magnitude = x.abs()
    code = torch.zeros_like(x, dtype=torch.uint8)
    for index, limit in enumerate(FP4_LIMITS):
        code += magnitude >= limit if index % 2 else magnitude > limit
    return code | (x.signbit().to(torch.uint8) << 3)


def codebook(format: str, device: torch.device) -> Tensor | None:
    """Return what each code of ``format`` stands for, f32 [16]; None where it has no codebook."""
    values = CODEBOOKS.get(format)
    return None if values is None else torch.tensor(values, device=device)


def to_codebook(x: Tensor, values: Tensor) -> Tensor:
    """Return the codes of the ``values`` [16] nearest to ``x``, uint8 of the same shape; a tie
    goes to the smaller value.

    Source: bitsandbytes 0.50, `backends/default/ops.py`, `quantize_4bit`.
    """
    ordered, order = torch.sort(values, stable=True)
    limits = (ordered[:-1] + ordered[1:]) / 2
    ranks = torch.bucketize(x, limits, out_int32=True)
    return look_up(order.to(torch.uint8), ranks)


def to_16_bits(x: Tensor) -> Tensor:
    """Round f32 ``x`` to 12 significant bits, which hold every float16 and bfloat16."""
    return ((x.contiguous().view(torch.int32) + 0x800) & ~0xFFF).view(torch.float32)


def mx_scale(amax: Tensor, largest: float) -> Tensor:
    """Return the power of two that compressed-tensors scales a group of ``amax`` by, for elements
    up to ``largest`` (6 or 448), f32.
    """
    mantissa, exponent = torch.frexp(amax)  # amax = mantissa * 2^exponent, mantissa in [0.5, 1)
    exponent = exponent - 1 + (mantissa >= 1.75 / 2) - int(math.log2(largest))
    return torch.where(amax > 0, torch.exp2(exponent.clamp(-127, 127).float()), 1.0)


def look_up(values: Tensor, codes: Tensor) -> Tensor:
    """Return the entry of ``values`` [C] that each of the ``codes`` stands for, of their shape; a
    third of the time of ``values[codes]`` on a CPU.
    """
    return values.index_select(0, codes.flatten().int()).view(codes.shape)


@lru_cache
def fp4_values(device: torch.device) -> Tensor:
    """Return what each E2M1 code stands for; kept, since CUDA graphs cannot hold the copy
    to a GPU.
    """
    return torch.tensor(FP4_VALUES, device=device)


def pack_pairs(codes: Tensor) -> Tensor:
    """Pack 4-bit ``codes``, uint8 [N, K], into [N, K/2]: the low nibble is the even column.
    UsageError when K is odd.
    """
    if codes.shape[-1] % 2:
        raise UsageError(
            "E_SHAPE", f"4-bit weights of {codes.shape[-1]} inputs cannot be paired into bytes"
        )
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def unpack_pairs(data: Tensor) -> Tensor:
    """Unpack uint8 [N, K/2] into codes 0..15, uint8 [N, K]."""
    return torch.stack((data & 15, data >> 4), dim=-1).flatten(-2)
