"""Triton kernels for the rest of a decoder layer: norms, rotary embedding, gated activations.

Each is one launch. It computes in f32 and rounds where the model's own code rounds, so that the
results are the same; codes are those of `row_quantize`.
"""

# ruff: noqa: N803, N806 (constants of a Triton kernel are written in capitals)
from __future__ import annotations

from functools import cache
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtool.runtime.kernels import device_of
from qtool.runtime.triton.gates import gate_times_up
from qtool.runtime.triton.row_quantize import codes_of, scale_of
from qtool.runtime.triton.tiles import start_early

Codes = Literal["fp8", "int8"]
Weights = tuple[Tensor, Tensor | None]  # of a norm, and its bias
TILE = 1024  # elements of a program at least, unless it needs a whole row
WARP = 512  # elements of each warp
PIECE = 16384  # elements of a row that a program keeps at most


def add_norm(
    x: Tensor,
    residual: Tensor | None,
    norm: Weights | None,
    eps: float,
    plus_one: bool,
    late: bool,
    centered: bool,
    *,
    after: Weights | None = None,
    factor: float = 1.0,
    other: Tensor | None = None,
    codes: Codes | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the norm of ``residual + other + factor * after(x)`` or its codes, the scales of
    codes, and the sum.

    Args:
        x: [T, K], contiguous.
        residual: the same shape, or None.
        norm: weight and bias, [K]; None: the result is the sum itself, or its codes.
        eps: of both norms, as the rest of their kind.
        plus_one: whether 1 is added to the weights.
        late: whether to round only after the product with the weight, not before as well.
        centered: whether the mean is subtracted first.
        after: weight and bias of the norm of ``x``; with ``residual`` only, as the next two.
        factor: of ``x``.
        other: the shape of ``x``.
        codes: the format to round the norm to; scales are f32 [T, 1].
    """
    tokens, width = x.shape
    total = x if residual is None else torch.empty_like(x)
    is_sum = norm is None and codes is None
    out, scale = (total, None) if is_sum else allocate_outputs(x, width, codes)
    block = triton.next_power_of_2(width)
    rows = max(1, TILE // block)
    weight, bias = norm or (None, None)
    after_weight, after_bias = after or (None, None)
    _add_norm[(triton.cdiv(tokens, rows),)](
        x=x,
        residual=residual,
        other=other,
        after_weight=after_weight,
        after_bias=after_bias,
        weight=weight,
        bias=bias,
        total=total,
        out=None if is_sum else out,
        scales=scale,
        T=tokens,
        K=width,
        eps=eps,
        factor=None if factor == 1 else factor,
        PLUS_ONE=plus_one,
        LATE=late,
        CENTERED=centered,
        FP8=codes == "fp8",
        ROWS=rows,
        BLOCK=block,
        **launch_options(x.device, rows * block),
    )
    return out, scale, total


def rotate_and_write(
    qkv: Tensor,
    at: tuple[int, int, int],
    heads: int,
    stride_q_head: int,
    norms: tuple[Tensor, Tensor, float, bool, bool, bool] | None,
    rotary: tuple[Tensor, Tensor] | None,
    rotated: int,
    k_pages: Tensor,
    v_pages: Tensor,
    scales: tuple[float, float],
    table: Tensor,
    rows: Tensor,
    positions: Tensor,
    *,
    interleaved: bool = False,
    angle_step: int = 1,
) -> Tensor:
    """Norm and rotate queries and keys; return queries [T, heads, D], write the others to pages.

    Args:
        qkv: queries, keys and values of each token, [T, ...].
        at: where the queries, keys and values of a token begin.
        heads: of queries.
        stride_q_head: from the queries of a head to those of the next.
        norms: the weights of the norms of queries and keys, [D] or [heads, D], or [heads * D] if
            all heads of a token share a norm; their epsilon, ``plus_one``, ``late`` and
            ``centered``, which those of all heads cannot be.
        rotary: cosines and sines, [T, at least rotated / 2 * angle_step]: channel ``i`` turns with
            channel ``rotated / 2 + i``, by angle ``i * angle_step``.
        rotated: how many channels of a head are rotated.
        k_pages: [pages, KV heads, page, D].
        v_pages: [pages, KV heads, page, D].
        scales: of keys and values in fp8 pages.
        table: as in `qtool.engine.attention.pages.Packed`.
        rows: likewise.
        positions: likewise.
        interleaved: whether channel ``2 i`` turns with channel ``2 i + 1`` instead.
        angle_step: see ``rotary``; with 2, products are not rounded.
    """
    tokens = qkv.shape[0]
    _, kv_heads, page, width = k_pages.shape
    q = qkv.new_empty(tokens, heads, width)
    q_weight, k_weight, eps, *kind = norms or (None, None, 0.0, False, False, False)
    plus_one, late, centered = kind
    cos, sin = rotary or (None, None)
    block = triton.next_power_of_2(width)
    together = max(1, TILE // block)
    _rotate_and_write[(tokens, triton.cdiv(heads, together) + 2 * triton.cdiv(kv_heads, together))](
        qkv=qkv,
        q_weight=q_weight,
        k_weight=k_weight,
        cos=cos,
        sin=sin,
        q=q,
        k_pages=k_pages,
        v_pages=v_pages,
        table=table,
        rows=rows,
        positions=positions,
        stride_qkv_token=qkv.stride(0),
        stride_table_row=table.stride(0),
        stride_k_page=k_pages.stride(0),
        stride_v_page=v_pages.stride(0),
        k_scale=scales[0],
        v_scale=scales[1],
        eps=eps,
        STRIDE_Q_HEAD=stride_q_head,
        Q_AT=at[0],
        K_AT=at[1],
        V_AT=at[2],
        HEADS=heads,
        KV_HEADS=kv_heads,
        D=width,
        ANGLES=0 if cos is None else cos.shape[-1],
        ROTATED=0 if cos is None else rotated,
        INTERLEAVED=interleaved,
        ANGLE_STEP=angle_step,
        EACH=q_weight is not None and q_weight.numel() > width,
        WHOLE=q_weight is not None and q_weight.shape[-1] > width,
        PLUS_ONE=plus_one,
        LATE=late,
        CENTERED=centered,
        FP8=k_pages.dtype == torch.float8_e4m3fn,
        PAGE=page,
        TOGETHER=together,
        **launch_options(qkv.device, together * block),
    )
    return q


def gated(
    x: Tensor,
    at: tuple[int, int],
    width: int,
    activation: Literal["silu", "gelu_tanh"],
    codes: Codes | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return ``activation(gate) * up`` [T, width] or its codes, and the scales of codes.

    Args:
        x: gate and up of each token, [T, ...].
        at: where gate and up begin in a row of ``x``.
        width: of gate and of up.
        activation: of the gate.
        codes: the format to round the result to.
    """
    tokens = x.shape[0]
    out, scale = allocate_outputs(x, width, codes)
    piece = min(triton.next_power_of_2(width), PIECE if codes else TILE)
    _gated[(tokens, 1 if codes else triton.cdiv(width, piece))](
        x=x,
        out=out,
        scales=scale,
        stride_x_row=x.stride(0),
        K=width,
        GATE_AT=at[0],
        UP_AT=at[1],
        SILU=activation == "silu",
        FP8=codes == "fp8",
        ONE=width <= piece,
        PIECE=piece,
        **launch_options(x.device, piece),
    )
    return out, scale


def gate_heads(
    x: Tensor, qkv: Tensor, at: int, heads: int, codes: Codes | None = None
) -> tuple[Tensor, Tensor | None]:
    """Do what `fused_attention.gate_heads` does."""
    tokens, width = x.shape
    out, scale = allocate_outputs(x, width, codes)
    block = triton.next_power_of_2(width)
    piece = block if codes else min(block, TILE)  # codes have a scale for all heads of a token
    _gate_heads[(tokens, triton.cdiv(width, piece))](
        x=x.contiguous(),
        gates=qkv,
        out=out,
        scales=scale,
        stride_gates_token=qkv.stride(0),
        AT=at,
        K=width,
        D=width // heads,
        FP8=codes == "fp8",
        PIECE=piece,
        **launch_options(x.device, piece),
    )
    return out, scale


def allocate_outputs(x: Tensor, width: int, codes: Codes | None) -> tuple[Tensor, Tensor | None]:
    """Allocate [T, width] results or codes, and the scales of codes."""
    dtype = {None: x.dtype, "fp8": torch.float8_e4m3fn, "int8": torch.int8}[codes]
    out = x.new_empty(x.shape[0], width, dtype=dtype)
    return out, x.new_empty(x.shape[0], 1, dtype=torch.float32) if codes else None


def launch_options(device: torch.device, size: int) -> dict[str, int | bool]:
    """Return Triton's options for programs of ``size`` elements.

    On Hopper they start while the kernel before them still runs.
    """
    early = _starts_early(device)
    return {
        "PDL": early,
        "num_warps": min(32, max(1, size // WARP)),
        **({"launch_pdl": True} if early else {}),
    }


@cache
def _starts_early(device: torch.device) -> bool:
    return device_of(device).capability >= 90


@triton.jit
def _normed(  # type: ignore[no-untyped-def]
    x,
    weight,
    mean_of_squares,
    eps,
    dtype: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    LATE: tl.constexpr,
    bias=None,
):
    """Return the RMSNorm of ``x``, f32 as ``weight`` and ``bias``, rounded to ``dtype``."""
    x = x * tl.rsqrt(mean_of_squares + eps)
    if not LATE:
        x = x.to(dtype).to(tl.float32)
    if PLUS_ONE:
        weight += 1.0
    x *= weight
    if bias is not None:
        x += bias
    return x.to(dtype)


@triton.jit
def row_norm(  # type: ignore[no-untyped-def]
    x,
    weight,
    bias,
    inside,
    K,
    eps,
    dtype: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    LATE: tl.constexpr,
    CENTERED: tl.constexpr,
):
    """Return the norm of each row of ``x``, f32 with zeros where not ``inside``, rounded."""
    if CENTERED:
        x = tl.where(inside, x - tl.sum(x, 1, keep_dims=True) / K, 0.0)
    mean = tl.sum(x * x, 1, keep_dims=True) / K
    return _normed(x, weight, mean, eps, dtype, PLUS_ONE, LATE, bias)


@triton.jit(do_not_specialize=["T"])
def _add_norm(  # type: ignore[no-untyped-def]
    x,
    residual,
    other,
    after_weight,
    after_bias,
    weight,
    bias,
    total,
    out,
    scales,
    T,
    K,
    eps,
    factor,
    PLUS_ONE: tl.constexpr,
    LATE: tl.constexpr,
    CENTERED: tl.constexpr,
    FP8: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    dtype: tl.constexpr = x.dtype.element_ty
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    k = tl.arange(0, BLOCK)[None, :]
    offsets, inside = row.to(tl.int64) * K + k, (row < T) & (k < K)
    # weights are there before the kernel ahead has ended
    weights = None if weight is None else tl.load(weight + k, mask=k < K, other=0.0).to(tl.float32)
    biases = None if bias is None else tl.load(bias + k, mask=k < K, other=0.0).to(tl.float32)
    if after_weight is not None:
        after_weights = tl.load(after_weight + k, mask=k < K, other=0.0).to(tl.float32)
        after_biases = (
            None
            if after_bias is None
            else tl.load(after_bias + k, mask=k < K, other=0.0).to(tl.float32)
        )
    start_early(PDL)
    value = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    if after_weight is not None:
        value = row_norm(
            value, after_weights, after_biases, inside, K, eps, dtype, PLUS_ONE, LATE, CENTERED
        ).to(tl.float32)
    if factor is not None:
        value = (value * factor).to(dtype).to(tl.float32)
    if residual is not None:
        before = tl.load(residual + offsets, mask=inside, other=0.0).to(tl.float32)
        if other is not None:
            before += tl.load(other + offsets, mask=inside, other=0.0).to(tl.float32)
            before = before.to(dtype).to(tl.float32)
        added = (value + before).to(dtype)
        tl.store(total + offsets, added, mask=inside)
        value = added.to(tl.float32)
    if out is not None:
        if weight is None:
            normed = value.to(dtype)
        else:
            normed = row_norm(
                value, weights, biases, inside, K, eps, dtype, PLUS_ONE, LATE, CENTERED
            )
        if scales is not None:
            value = normed.to(tl.float32)
            scale = scale_of(tl.max(tl.abs(value), 1, keep_dims=True), FP8)
            tl.store(scales + row, scale, mask=row < T)
            normed = codes_of(value, scale, FP8)
        tl.store(out + offsets, normed, mask=inside)


@triton.jit
def put(value, pointers, inside, scale, FP8: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store ``value``, f32; divided by ``scale`` for fp8."""
    if FP8:
        inverse, scale = tl.div_rn(1.0, scale), tl.zeros_like(value) + scale
        # not infinite, which the next line would make NaN
        ratio = tl.clamp(value * inverse, -1000.0, 1000.0, propagate_nan=tl.PropagateNan.ALL)
        # value / scale, correctly rounded, as in `codes_of`
        ratio = tl.fma(tl.fma(-ratio, scale, value), tl.zeros_like(value) + inverse, ratio)
        value = tl.clamp(ratio, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(pointers, value.to(pointers.dtype.element_ty), mask=inside)


@triton.jit
def _turned(  # type: ignore[no-untyped-def]
    value,
    cos,
    other,
    sin,
    angle: tl.constexpr,
    dtype: tl.constexpr,
):
    """Return ``value * cos + other * sin``, f32, each rounded."""
    return (
        ((value * cos).to(angle).to(tl.float32) + (other * sin).to(angle).to(tl.float32))
        .to(dtype)
        .to(tl.float32)
    )


@triton.jit
def _mean_of_heads(  # type: ignore[no-untyped-def]
    x, stride, HEADS: tl.constexpr, D: tl.constexpr, TOGETHER: tl.constexpr
):
    """Return the mean of the squares of all heads, the first at ``x``."""
    d = tl.arange(0, triton.next_power_of_2(D))[None, :]
    head = tl.arange(0, TOGETHER)[:, None]
    squares = tl.zeros((TOGETHER, triton.next_power_of_2(D)), tl.float32)
    for first in range(0, HEADS, TOGETHER):
        inside = (first + head < HEADS) & (d < D)
        value = tl.load(x + (first + head) * stride + d, mask=inside, other=0.0).to(tl.float32)
        squares += value * value
    return tl.sum(squares) / (HEADS * D)


@triton.jit
def _load_pairs(  # type: ignore[no-untyped-def]
    pointers, inside, i, HALF: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """Return the numbers of pairs ``i`` [H, P] that stand at ``pointers``, f32: those of the first
    channels and of the second.

    Neighbours are loaded together and then parted, each within its thread.
    """
    if INTERLEAVED:
        channel = tl.zeros(inside.shape, tl.int32) + tl.arange(0, 2 * i.shape[1])[None, :]
        both = tl.load(pointers + channel, mask=inside & (channel < 2 * HALF), other=0.0)
        first, second = tl.split(tl.reshape(both.to(tl.float32), (i.shape[0], i.shape[1], 2)))
    else:
        first = tl.load(pointers + i, mask=inside & (i < HALF), other=0.0).to(tl.float32)
        second = tl.load(pointers + HALF + i, mask=inside & (i < HALF), other=0.0).to(tl.float32)
    return first, second


@triton.jit
def put_heads(  # type: ignore[no-untyped-def]
    x,
    out,
    inside,
    weight,
    mean,
    cos,
    sin,
    eps,
    scale,
    D: tl.constexpr,
    ROTATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ANGLE_STEP: tl.constexpr,
    EACH: tl.constexpr,
    WHOLE: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    LATE: tl.constexpr,
    CENTERED: tl.constexpr,
    FP8: tl.constexpr,
    PARTED: tl.constexpr = False,
):
    """Norm the heads at ``x`` [H, 1], rotate them, and store those ``inside`` at ``out`` [H, 1].

    ``weight`` is that of any head, or of ``EACH`` at ``x``. If the norm is over the ``WHOLE`` of a
    token, ``mean`` is the mean of the squares of all heads. Each rotated channel of the first half
    turns with one of the second half, or each with its neighbour, from which it is then
    ``PARTED``. All loads have the shape
    [H, ...], those of the angles too: with another shape they would have another layout, and go
    through shared memory.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    HALF: tl.constexpr = ROTATED // 2
    REST: tl.constexpr = D - ROTATED
    every = tl.full(x.shape, True, tl.int1)
    if HALF:
        i = tl.zeros(x.shape, tl.int32) + tl.arange(0, triton.next_power_of_2(HALF))[None, :]
        first, second = _load_pairs(x, inside, i, HALF, INTERLEAVED)
    if REST:
        j = tl.zeros(x.shape, tl.int32) + tl.arange(0, triton.next_power_of_2(REST))[None, :]
        resting = inside & (j < REST)
        rest = tl.load(x + ROTATED + j, mask=resting, other=0.0).to(tl.float32)
    if CENTERED:
        sums = tl.zeros(x.shape, tl.float32)
        if HALF:
            sums += tl.sum(first + second, 1, keep_dims=True)
        if REST:
            sums += tl.sum(rest, 1, keep_dims=True)
        if HALF:
            first = tl.where(i < HALF, first - sums / D, 0.0)
            second = tl.where(i < HALF, second - sums / D, 0.0)
        if REST:
            rest = tl.where(j < REST, rest - sums / D, 0.0)
    if weight is not None and not WHOLE:
        squares = tl.zeros(x.shape, tl.float32)
        if HALF:
            squares += tl.sum(first * first + second * second, 1, keep_dims=True)
        if REST:
            squares += tl.sum(rest * rest, 1, keep_dims=True)
        mean = squares / D
    if HALF:
        if weight is not None:
            known = inside if EACH else every
            first_weight, second_weight = _load_pairs(weight, known, i, HALF, INTERLEAVED)
            first = _normed(first, first_weight, mean, eps, dtype, PLUS_ONE, LATE).to(tl.float32)
            second = _normed(second, second_weight, mean, eps, dtype, PLUS_ONE, LATE).to(tl.float32)
        angle: tl.constexpr = tl.float32 if ANGLE_STEP == 2 else cos.dtype.element_ty
        if ANGLE_STEP == 2:
            cosine, _ = _load_pairs(cos, every, i, HALF, True)
            sine, _ = _load_pairs(sin, every, i, HALF, True)
        else:
            cosine = tl.load(cos + i, mask=i < HALF).to(tl.float32)
            sine = tl.load(sin + i, mask=i < HALF).to(tl.float32)
        if INTERLEAVED and not PARTED:
            both = tl.join(
                _turned(first, cosine, -second, sine, angle, dtype),
                _turned(second, cosine, first, sine, angle, dtype),
            )
            both = tl.reshape(both, (i.shape[0], 2 * i.shape[1]))
            channel = tl.zeros(x.shape, tl.int32) + tl.arange(0, 2 * i.shape[1])[None, :]
            put(both, out + channel, inside & (channel < ROTATED), scale, FP8)
        else:
            turning = inside & (i < HALF)
            put(_turned(first, cosine, -second, sine, angle, dtype), out + i, turning, scale, FP8)
            put(
                _turned(second, cosine, first, sine, angle, dtype),
                out + HALF + i,
                turning,
                scale,
                FP8,
            )
    if REST:
        if weight is not None:
            rest_weight = tl.load(
                weight + ROTATED + j, mask=resting if EACH else j < REST, other=0.0
            ).to(tl.float32)
            rest = _normed(rest, rest_weight, mean, eps, dtype, PLUS_ONE, LATE).to(tl.float32)
        put(rest, out + ROTATED + j, resting, scale, FP8)


@triton.jit(
    do_not_specialize=["k_scale", "v_scale", "eps"],
    do_not_specialize_on_alignment=["table", "rows", "positions"],
)
def _rotate_and_write(  # type: ignore[no-untyped-def]
    qkv,
    q_weight,
    k_weight,
    cos,
    sin,
    q,
    k_pages,
    v_pages,
    table,
    rows,
    positions,
    stride_qkv_token,
    stride_table_row,
    stride_k_page,
    stride_v_page,
    k_scale,
    v_scale,
    eps,
    STRIDE_Q_HEAD: tl.constexpr,
    Q_AT: tl.constexpr,
    K_AT: tl.constexpr,
    V_AT: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    ANGLES: tl.constexpr,
    ROTATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ANGLE_STEP: tl.constexpr,
    EACH: tl.constexpr,
    WHOLE: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    LATE: tl.constexpr,
    CENTERED: tl.constexpr,
    FP8: tl.constexpr,
    PAGE: tl.constexpr,
    TOGETHER: tl.constexpr,
    PDL: tl.constexpr,
):
    t, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    q_blocks: tl.constexpr = (HEADS + TOGETHER - 1) // TOGETHER
    kv_blocks: tl.constexpr = (KV_HEADS + TOGETHER - 1) // TOGETHER
    start_early(PDL)
    x = qkv + t * stride_qkv_token
    if ROTATED:
        cos += t * ANGLES
        sin += t * ANGLES
    if block < q_blocks:
        head = (block * TOGETHER + tl.arange(0, TOGETHER))[:, None]
        put_heads(
            x + Q_AT + head * STRIDE_Q_HEAD,
            q + (t * HEADS + head) * D,
            head < HEADS,
            q_weight + head * D if EACH else q_weight,
            _mean_of_heads(x + Q_AT, STRIDE_Q_HEAD, HEADS, D, TOGETHER) if WHOLE else None,
            cos,
            sin,
            eps,
            1.0,
            D,
            ROTATED,
            INTERLEAVED,
            ANGLE_STEP,
            EACH,
            WHOLE,
            PLUS_ONE,
            LATE,
            CENTERED,
            False,
        )
    else:
        position = tl.load(positions + t)
        page = tl.load(
            table + tl.load(rows + t).to(tl.int64) * stride_table_row + position // PAGE
        ).to(tl.int64)
        head = ((block - q_blocks) % kv_blocks * TOGETHER + tl.arange(0, TOGETHER))[:, None]
        slot = (head * PAGE + position % PAGE) * D
        if block < q_blocks + kv_blocks:
            out = k_pages + page * stride_k_page + slot
            put_heads(
                x + K_AT + head * D,
                out,
                head < KV_HEADS,
                k_weight + head * D if EACH else k_weight,
                _mean_of_heads(x + K_AT, D, KV_HEADS, D, TOGETHER) if WHOLE else None,
                cos,
                sin,
                eps,
                k_scale,
                D,
                ROTATED,
                INTERLEAVED,
                ANGLE_STEP,
                EACH,
                WHOLE,
                PLUS_ONE,
                LATE,
                CENTERED,
                FP8,
            )
        else:
            out = v_pages + page * stride_v_page + slot
            put_heads(
                x + V_AT + head * D,
                out,
                head < KV_HEADS,
                None,
                None,
                None,
                None,
                eps,
                v_scale,
                D,
                0,
                False,
                1,
                False,
                False,
                PLUS_ONE,
                LATE,
                False,
                FP8,
            )


@triton.jit
def _gate_times_up(gate, up, inside, SILU: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the activation of the numbers at ``gate``, rounded, times those at ``up``, rounded."""
    kind: tl.constexpr = "swiglu" if SILU else "gelu_tanh"
    factor = tl.load(up, mask=inside, other=0.0)
    return gate_times_up(tl.load(gate, mask=inside, other=0.0), factor, kind)


@triton.jit
def _gate_heads(  # type: ignore[no-untyped-def]
    x,
    gates,
    out,
    scales,
    stride_gates_token,
    AT: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    FP8: tl.constexpr,
    PIECE: tl.constexpr,
    PDL: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    k = (tl.program_id(1) * PIECE + tl.arange(0, PIECE))[None, :]
    inside = k < K
    dtype: tl.constexpr = x.dtype.element_ty
    start_early(PDL)
    value = tl.load(x + token * K + k, mask=inside, other=0.0).to(tl.float32)
    of_gate = gates + token * stride_gates_token + AT + k // D * (2 * D) + D + k % D
    gate = tl.sigmoid(tl.load(of_gate, mask=inside, other=0.0).to(tl.float32))
    result = (value * gate.to(dtype).to(tl.float32)).to(dtype)
    if scales is not None:
        result = result.to(tl.float32)
        scale = scale_of(tl.max(tl.abs(result), 1, keep_dims=True), FP8)
        tl.store(scales + token + tl.zeros((1, 1), tl.int32), scale)
        result = codes_of(result, scale, FP8)
    tl.store(out + token * K + k, result, mask=inside)


@triton.jit
def _gated(  # type: ignore[no-untyped-def]
    x,
    out,
    scales,
    stride_x_row,
    K,
    GATE_AT: tl.constexpr,
    UP_AT: tl.constexpr,
    SILU: tl.constexpr,
    FP8: tl.constexpr,
    ONE: tl.constexpr,
    PIECE: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    gate, up, out = x + row * stride_x_row + GATE_AT, x + row * stride_x_row + UP_AT, out + row * K
    k = tl.arange(0, PIECE)[None, :]
    start_early(PDL)
    if scales is None:
        k += tl.program_id(1) * PIECE
        tl.store(out + k, _gate_times_up(gate + k, up + k, k < K, SILU), mask=k < K)
    elif ONE:
        value = _gate_times_up(gate + k, up + k, k < K, SILU)
        scale = scale_of(tl.max(tl.abs(value.to(tl.float32)), 1, keep_dims=True), FP8)
        tl.store(scales + row + tl.zeros((1, 1), tl.int32), scale)
        tl.store(out + k, codes_of(value.to(tl.float32), scale, FP8), mask=k < K)
    else:
        amax = tl.zeros((1, PIECE), tl.float32)
        for start in range(0, K, PIECE):
            inside = start + k < K
            amax = tl.maximum(
                amax,
                tl.abs(
                    _gate_times_up(gate + start + k, up + start + k, inside, SILU).to(tl.float32)
                ),
            )
        scale = scale_of(tl.max(amax, 1, keep_dims=True), FP8)
        tl.store(scales + row + tl.zeros((1, 1), tl.int32), scale)
        for start in range(0, K, PIECE):
            inside = start + k < K
            value = _gate_times_up(gate + start + k, up + start + k, inside, SILU)
            tl.store(out + start + k, codes_of(value.to(tl.float32), scale, FP8), mask=inside)
