"""Rounding the rows of an input to 8-bit codes and scales, in Triton, as `fake_quantize_input`."""

# ruff: noqa: N803 (constants of a Triton kernel are written in capitals)
from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtool.runtime.triton.tiles import start_early

PIECE = 16384  # elements of a row at a time
TOGETHER = 2048  # elements of short rows that a program rounds together


def quantize_rows(
    x: Tensor,
    format: Literal["fp8", "int8"],
    static_scale: Tensor | None = None,
    *,
    pdl: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the codes of ``x`` [M, K], and the scales of its rows, f32 [M, 1].

    Args:
        x: contiguous.
        format: of the codes.
        static_scale: one scale for all rows, a scalar, or one for each, f32 [M].
        pdl: on sm_90, start while the kernel before it ends. The next kernel may do so too, if it
            waits for this one by itself.
    """
    rows, columns = x.shape
    codes = torch.empty_like(x, dtype=torch.float8_e4m3fn if format == "fp8" else torch.int8)
    scale = x.new_empty((rows, 1), dtype=torch.float32)
    piece = min(triton.next_power_of_2(columns), PIECE)
    together = max(1, TOGETHER // piece) if static_scale is None else 1
    options = {"launch_pdl": True} if pdl else {}
    _quantize[(triton.cdiv(rows, together),)](
        x=x,
        static_scale=static_scale,
        codes=codes,
        scales=scale,
        M=rows,
        K=columns,
        EACH=static_scale is not None and static_scale.numel() > 1,
        FP8=format == "fp8",
        PIECE=piece,
        ROWS=together,
        PDL=pdl,
        num_warps=min(16, max(1, together * piece // 1024)),
        **options,
    )
    return codes, scale


@triton.jit
def scale_of(amax, FP8: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the scale of rows with the largest magnitudes ``amax`` [R, 1]."""
    scale = tl.div_rn(amax, tl.full((1, 1), 448.0 if FP8 else 127.0, tl.float32))
    return tl.where(scale > 1e-36, scale, 1.0)  # a smaller scale has no f32 reciprocal


@triton.jit
def codes_of(x, scale, FP8: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the codes of ``x`` [R, K] with ``scale`` [R, 1], both f32: rounded half to even,
    saturated.
    """
    inverse = tl.broadcast_to(tl.div_rn(tl.full((1, 1), 1.0, tl.float32), scale), x.shape)
    scale = tl.broadcast_to(scale, x.shape)
    ratio = x * inverse
    # after this Newton step it is x / scale, correctly rounded
    ratio = tl.fma(tl.fma(-ratio, scale, x), inverse, ratio)
    if FP8:
        return tl.clamp(ratio, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv)
    else:
        # 1.5 * 2^23: a number added to it is rounded to an integer, half to even, in the last bits
        magic = 12582912.0
        return (tl.clamp(ratio, -128.0, 127.0) + magic).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["static_scale"])
def _quantize(  # type: ignore[no-untyped-def]
    x,
    static_scale,
    codes,
    scales,
    M,
    K,
    EACH: tl.constexpr,
    FP8: tl.constexpr,
    PIECE: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    row = m.to(tl.int64) * K
    k = tl.arange(0, PIECE)[None, :]
    exists = m < M
    start_early(PDL)
    if static_scale is None:
        amax = tl.zeros((ROWS, PIECE), tl.float32)
        for start in range(0, K, PIECE):
            piece = tl.load(x + row + start + k, mask=exists & (start + k < K), other=0.0)
            amax = tl.maximum(amax, tl.abs(piece.to(tl.float32)))
        scale = scale_of(tl.max(amax, 1, keep_dims=True), FP8)
    else:
        scale = tl.load(static_scale + (m if EACH else m * 0))
        scale = tl.where(scale > 1e-36, scale, 1.0)
    tl.store(scales + m, scale, mask=exists)
    for start in range(0, K, PIECE):
        inside = exists & (start + k < K)
        piece = tl.load(x + row + start + k, mask=inside, other=0.0).to(tl.float32)
        tl.store(codes + row + start + k, codes_of(piece, scale, FP8), mask=inside)
