"""Triton kernel for what multi-head latent attention does between its matmuls: the norm of latents,
the rotary embedding of queries and keys, and writing to the cache, in one launch.
"""

# ruff: noqa: N803, N806 (constants of a Triton kernel are written in capitals)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtool.engine.elementwise import TILE, launch_options, put, put_heads, row_norm
from qtool.runtime.triton.tiles import start_early


def rotate_and_write(
    q: Tensor,
    kv: Tensor,
    q_rope: Tensor,
    rank: int,
    weight: Tensor,
    eps: float,
    kind: tuple[bool, bool, bool],
    rotary: tuple[Tensor, Tensor] | None,
    pages: Tensor,
    scale: float,
    table: Tensor,
    rows: Tensor,
    positions: Tensor,
    *,
    interleaved: bool,
    parted: bool,
) -> None:
    """Norm latents, rotate the keys beside them, and write both to pages; rotate queries.

    Args:
        q: queries of each token, [T, heads * (key width + rotary)].
        kv: a latent and a key of each token, [T, rank + rotary].
        q_rope: [T, heads, rotary], of any strides between tokens and heads: where the rotary part
            of queries is written.
        rank: numbers of a latent, a power of two.
        weight: of the norm of latents, [rank].
        eps: of the norm.
        kind: ``plus_one``, ``late`` and ``centered`` of the norm.
        rotary: cosines and sines, as in `elementwise.rotate_and_write`.
        pages: [pages, 1, page, rank + rotary].
        scale: of fp8 pages.
        table: as in `qtool.engine.attention.pages.Packed`.
        rows: likewise.
        positions: likewise.
        interleaved: whether neighbouring channels rotate together.
        parted: whether neighbours then stand half of the channels apart.
    """
    tokens, heads, turning = q_rope.shape
    page = pages.shape[2]
    cos, sin = rotary or (None, None)
    block = triton.next_power_of_2(turning)
    together = min(triton.next_power_of_2(heads), max(1, TILE // block))
    plus_one, late, centered = kind
    _rotate_and_write[(tokens, 1 + triton.cdiv(heads, together))](
        q=q,
        kv=kv,
        q_rope=q_rope,
        weight=weight,
        cos=cos,
        sin=sin,
        pages=pages,
        table=table,
        rows=rows,
        positions=positions,
        stride_q_token=q.stride(0),
        stride_kv_token=kv.stride(0),
        stride_q_rope_token=q_rope.stride(0),
        stride_q_rope_head=q_rope.stride(1),
        stride_table_row=table.stride(0),
        stride_page=pages.stride(0),
        scale=scale,
        eps=eps,
        RANK=rank,
        TURNING=turning,
        KEY=q.shape[1] // heads - turning,
        HEADS=heads,
        ANGLES=0 if cos is None else cos.shape[-1],
        ROTATED=0 if cos is None else turning,
        INTERLEAVED=interleaved,
        PARTED=parted,
        PLUS_ONE=plus_one,
        LATE=late,
        CENTERED=centered,
        FP8=pages.dtype == torch.float8_e4m3fn,
        PAGE=page,
        TOGETHER=together,
        **launch_options(q.device, max(rank, together * block)),
    )


@triton.jit(
    do_not_specialize=["scale", "eps"],
    do_not_specialize_on_alignment=["table", "rows", "positions"],
)
def _rotate_and_write(  # type: ignore[no-untyped-def]
    q,
    kv,
    q_rope,
    weight,
    cos,
    sin,
    pages,
    table,
    rows,
    positions,
    stride_q_token,
    stride_kv_token,
    stride_q_rope_token,
    stride_q_rope_head,
    stride_table_row,
    stride_page,
    scale,
    eps,
    RANK: tl.constexpr,
    TURNING: tl.constexpr,
    KEY: tl.constexpr,
    HEADS: tl.constexpr,
    ANGLES: tl.constexpr,
    ROTATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PARTED: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    LATE: tl.constexpr,
    CENTERED: tl.constexpr,
    FP8: tl.constexpr,
    PAGE: tl.constexpr,
    TOGETHER: tl.constexpr,
    PDL: tl.constexpr,
):
    t, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    WIDTH: tl.constexpr = RANK + TURNING
    start_early(PDL)
    if ROTATED:
        cos += t * ANGLES
        sin += t * ANGLES
    if block == 0:
        position = tl.load(positions + t)
        page = tl.load(
            table + tl.load(rows + t).to(tl.int64) * stride_table_row + position // PAGE
        ).to(tl.int64)
        out = pages + page * stride_page + position % PAGE * WIDTH
        x = kv + t * stride_kv_token
        i = tl.arange(0, RANK)[None, :]
        every = i < RANK
        latent = row_norm(
            tl.load(x + i).to(tl.float32),
            tl.load(weight + i).to(tl.float32),
            None,
            every,
            RANK,
            eps,
            kv.dtype.element_ty,
            PLUS_ONE,
            LATE,
            CENTERED,
        )
        put(latent.to(tl.float32), out + i, every, scale, FP8)
        alone = tl.zeros((1, 1), tl.int32)
        _rotate(
            x + RANK + alone,
            out + RANK + alone,
            alone == 0,
            cos,
            sin,
            scale,
            TURNING,
            ROTATED,
            INTERLEAVED,
            PARTED,
            FP8,
        )
    else:
        head = ((block - 1) * TOGETHER + tl.arange(0, TOGETHER))[:, None]
        _rotate(
            q + t * stride_q_token + head * (KEY + TURNING) + KEY,
            q_rope + t * stride_q_rope_token + head * stride_q_rope_head,
            head < HEADS,
            cos,
            sin,
            1.0,
            TURNING,
            ROTATED,
            INTERLEAVED,
            PARTED,
            False,
        )


@triton.jit
def _rotate(  # type: ignore[no-untyped-def]
    source,
    target,
    inside,
    cos,
    sin,
    scale,
    TURNING: tl.constexpr,
    ROTATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PARTED: tl.constexpr,
    FP8: tl.constexpr,
):
    put_heads(
        source,
        target,
        inside,
        None,
        None,
        cos,
        sin,
        0.0,
        scale,
        TURNING,
        ROTATED,
        INTERLEAVED,
        1,
        False,
        False,
        False,
        False,
        False,
        FP8,
        PARTED,
    )
