"""Paged attention in Triton: writing to the KV cache, decode, and prefill of chunks.

Decode and prefill take the query heads that share a KV head as rows of one tile, so that keys and
values are read once for all of them. The host knows everything that a launch depends on without
asking the device; programs that find no work end at once. Logits are kept in units of log2.
"""

# ruff: noqa: N803, N806 (constants of a Triton kernel are written in capitals)
from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtool.engine.attention.pages import LOG2_E, PAGE, KVPages, Packed
from qtool.engine.attention.triton_parts import power_of_two, store_part
from qtool.runtime.triton.tiles import GLUON, start_early

LONG = 16384  # tokens that a sequence may have where few are cut with long ones in mind
# a sequence is cut into more than so many parts only if each has so many steps
MANY_PARTS = tl.constexpr(16)
MANY_STEPS = tl.constexpr(4)
# arguments whose values must not make Triton compile a kernel again
ANY_VALUE = {
    "do_not_specialize": ["stride_table_row", "window", "least", "decodes"],
    "do_not_specialize_on_alignment": [
        "table",
        "rows",
        "positions",
        "starts",
        "contexts",
        "partial",
        "sums",
        "arrived",
    ],
}


@dataclass(frozen=True)
class Tile:
    """How the work of attention is cut."""

    keys: int
    """Of a step."""
    warps: int
    stages: int
    rows: int = 16
    """Query rows of a program of prefill."""
    parts: int = 1
    """Into how many parts the keys of a decode are cut, at most."""
    least: int = 1
    """Steps of each part, at least."""
    pdl: bool = True
    """Whether the kernel starts while the one before it ends."""
    numbers: int = 64
    """How many numbers of the parts a thread adds at a time, at most."""


def decode_tile(
    programs: int, most: int, head_dim: int, itemsize: int, *, fp8: bool = False
) -> Tile:
    """Choose for decode.

    Args:
        programs: sequences times KV heads.
        most: tokens of the longest sequence.
        head_dim: of keys or values, the larger.
        itemsize: bytes of a number in the queries.
        fp8: whether the pages keep fp8.
    """
    keys = 64 if head_dim <= 128 else 32
    if itemsize == 4:
        keys = 16
    # few: cut until the machine is full
    if programs <= 64 and most >= LONG and keys == 64:
        if fp8:
            return Tile(keys, 2, 3, parts=max(16, min(64, power_of_two(1024 // programs))))
        parts = max(8, min(32, power_of_two(512 // programs)))
        if parts > MANY_PARTS.value:  # all in one round
            return Tile(keys, 4, 3, parts=parts, numbers=128)
        return Tile(keys, 4, 3 if parts > 8 else 2, parts=parts)
    if programs <= 256:
        parts = MANY_PARTS.value if programs <= 64 else power_of_two(512 // programs)
        least = 1
    else:  # cut only long sequences, for the sake of balance
        parts = 4
        least = 4096 // keys
    return Tile(keys, 4, 2, parts=max(1, min(parts, triton.cdiv(most, keys * least))), least=least)


def prefill_tile(head_dim: int, itemsize: int) -> Tile:
    """Choose for prefill of chunks."""
    if itemsize == 4:
        return Tile(16, 4, 2, rows=32)
    return Tile(64, 8, 3, rows=128) if head_dim <= 128 else Tile(32, 8, 2, rows=128)


def write(kv: KVPages, k: Tensor, v: Tensor, packed: Packed) -> None:
    """Store the keys and values of new tokens, see `interface.write`."""
    k, v = _inner_contiguous(k), _inner_contiguous(v)
    if not k.shape[0]:
        return
    tokens, heads, head_dim = k.shape
    _write[(tokens,)](
        k=k,
        v=v,
        k_pages=kv.k,
        v_pages=kv.v,
        table=packed.table,
        rows=packed.rows,
        positions=packed.positions,
        stride_table_row=packed.table.shape[1],
        stride_k_token=k.stride(0),
        stride_k_head=k.stride(1),
        stride_v_token=v.stride(0),
        stride_v_head=v.stride(1),
        stride_k_page=kv.k.stride(0),
        stride_k_page_head=kv.k.stride(1),
        stride_v_page=kv.v.stride(0),
        stride_v_page_head=kv.v.stride(1),
        k_factor=1 / kv.k_scale,
        v_factor=1 / kv.v_scale,
        HEADS=heads,
        D=head_dim,
        DV=v.shape[2],
        PAGE=PAGE,
        FP8=kv.k.dtype == torch.float8_e4m3fn,
        KEYS_ALONE=kv.keeps_latents,
        SIZE=triton.next_power_of_2(heads * max(head_dim, v.shape[2])),
        **launch_options(4, 1, True, k),
    )


def decode(
    q: Tensor,
    kv: KVPages,
    packed: Packed,
    out: Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None = None,
    tile: Tile | None = None,
) -> None:
    """Fill ``out`` [T, heads, v_head_dim] for the decodes, see `interface.attend`."""
    q = _inner_contiguous(q)
    tokens = packed.decodes
    kv_heads = kv.k.shape[1]
    head_dim = q.shape[2]
    v_head_dim = out.shape[2]
    if tile is None and GLUON and is_hopper(q.device):
        from qtool.engine.attention import gluon_decode

        if gluon_decode.applies(q, kv, window, softcap, sinks):
            factor, _, v_scale = _factors(kv, scaling, softcap)
            launch = launch_options(1, 1, True, q)
            gluon_decode.decode(q, kv, packed, out, factor=factor, v_scale=v_scale, launch=launch)
            return
    most = packed.most or packed.table.shape[1] * PAGE
    tile = tile or decode_tile(
        tokens * kv_heads,
        most,
        max(head_dim, v_head_dim),
        q.element_size(),
        fp8=kv.k.dtype == torch.float8_e4m3fn,
    )
    shared = q.shape[1] // kv_heads
    split = tile.parts > 1
    partial = q.new_empty(
        (tokens, kv_heads, tile.parts, shared, v_head_dim) if split else 1, dtype=torch.float32
    )
    sums = q.new_empty(
        (2, tokens, kv_heads, tile.parts, shared) if split else 1, dtype=torch.float32
    )
    counters = packed.counters
    if counters is None or counters.numel() < tokens * kv_heads:
        counters = q.new_zeros(tokens * kv_heads if split else 1, dtype=torch.int32)
    shared_padded, dv_padded = triton.next_power_of_2(shared), triton.next_power_of_2(v_head_dim)
    _decode[(kv_heads, tile.parts, tokens)](
        partial=partial,
        sums=sums,
        arrived=counters,
        least=tile.least,
        SHARED_PADDED=shared_padded,
        ROWS=max(16, shared_padded),
        KEYS=tile.keys,
        PARTS=tile.parts,
        TOGETHER=max(
            1,
            min(
                triton.next_power_of_2(tile.parts),
                32 * tile.warps * tile.numbers // (shared_padded * dv_padded),
            ),
        ),
        STAGES=tile.stages,
        **_inputs(q, kv, packed, out, scaling, window, softcap, sinks),
        **launch_options(tile.warps, tile.stages, tile.pdl, q),
    )


def prefill(
    q: Tensor,
    kv: KVPages,
    packed: Packed,
    out: Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None = None,
    tile: Tile | None = None,
) -> None:
    """Fill ``out`` [T, heads, v_head_dim] for the tokens of chunks, see `interface.attend`."""
    assert packed.starts is not None
    q = _inner_contiguous(q)
    kv_heads = kv.k.shape[1]
    head_dim = q.shape[2]
    v_head_dim = out.shape[2]
    if tile is None and GLUON and is_hopper(q.device):
        from qtool.engine.attention import gluon_prefill

        if sinks is None and gluon_prefill.applies(q, kv, out, window, softcap):
            factor, _, v_scale = _factors(kv, scaling, softcap)
            gluon_prefill.prefill(
                q,
                kv,
                packed,
                out,
                factor=factor,
                v_scale=v_scale,
                launch=launch_options(4, 1, True, q),
            )
            return
    tile = tile or prefill_tile(max(head_dim, v_head_dim), q.element_size())
    shared = q.shape[1] // kv_heads
    rows = max(tile.rows, triton.next_power_of_2(shared))
    grid = (triton.cdiv(packed.longest, rows // shared), kv_heads, packed.starts.numel() - 1)
    prefill_kernel[grid](
        q_rope=None,
        k_rope=None,
        contexts=None,
        stride_q_rope_token=0,
        stride_q_rope_head=0,
        stride_k_rope=0,
        starts=packed.starts,
        stride_out_token=out.stride(0),
        decodes=packed.decodes,
        ROPE=0,
        ROWS=rows,
        KEYS=tile.keys,
        STAGES=tile.stages,
        **_inputs(q, kv, packed, out, scaling, window, softcap, sinks),
        **launch_options(tile.warps, tile.stages, tile.pdl, q),
    )


def _inner_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def _inputs(
    q: Tensor,
    kv: KVPages,
    packed: Packed,
    out: Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> dict[str, object]:
    """Return the arguments that the kernels of decode and prefill share, by name."""
    factor, limit, v_scale = _factors(kv, scaling, softcap)
    head_dim = q.shape[2]
    v_head_dim = out.shape[2]
    return {
        "q": q,
        "k_pages": kv.k,
        "v_pages": kv.v,
        "table": packed.table,
        "rows": packed.rows,
        "positions": packed.positions,
        "out": out,
        "sinks": sinks,
        "stride_table_row": packed.table.shape[1],
        "stride_q_token": q.stride(0),
        "stride_q_head": q.stride(1),
        "stride_k_page": kv.k.stride(0),
        "stride_k_page_head": kv.k.stride(1),
        "stride_v_page": kv.v.stride(0),
        "stride_v_page_head": kv.v.stride(1),
        "factor": factor,
        "limit": limit,
        "v_scale": v_scale,
        "window": window or 0,
        "WINDOWED": window is not None,
        "SOFTCAP": bool(softcap),
        "SHARED": q.shape[1] // kv.k.shape[1],
        "D": head_dim,
        "D_PADDED": max(16, triton.next_power_of_2(head_dim)),
        "DV": v_head_dim,
        "DV_PADDED": max(16, triton.next_power_of_2(v_head_dim)),
        "PAGE": PAGE,
    }


def _factors(kv: KVPages, scaling: float, softcap: float | None) -> tuple[float, float, float]:
    """Return the factor and the limit of the logits, in units of log2, and that of the result."""
    scale = scaling * kv.k_scale
    if softcap:
        return scale / softcap, softcap * LOG2_E, kv.v_scale
    return scale * LOG2_E, 0.0, kv.v_scale


def launch_options(warps: int, stages: int, pdl: bool, x: Tensor) -> dict[str, int | bool]:
    """Return how Triton launches a kernel that may start early, if the device of ``x`` can."""
    early = pdl and not _old(x.device)
    return {
        "num_warps": warps,
        "num_stages": stages,
        "PDL": early,
        **({"launch_pdl": True} if early else {}),
    }


@cache
def _old(device: torch.device) -> bool:
    """Whether ``device`` is older than Hopper: no kernel starts there before the last one ends."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 9


@cache
def is_hopper(device: torch.device) -> bool:
    """Whether kernels for ``device`` are for sm_90, as those for the meta device are."""
    return device.type == "meta" or (
        device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    )


@triton.jit(**ANY_VALUE)
def _write(  # type: ignore[no-untyped-def]
    k,
    v,
    k_pages,
    v_pages,
    table,
    rows,
    positions,
    stride_table_row,
    stride_k_token,
    stride_k_head,
    stride_v_token,
    stride_v_head,
    stride_k_page,
    stride_k_page_head,
    stride_v_page,
    stride_v_page_head,
    k_factor,
    v_factor,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PAGE: tl.constexpr,
    FP8: tl.constexpr,
    KEYS_ALONE: tl.constexpr,
    SIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    start_early(PDL)
    token = tl.program_id(0)
    position = tl.load(positions + token)
    page = tl.load(table + tl.load(rows + token) * stride_table_row + position // PAGE).to(tl.int64)
    i = tl.arange(0, SIZE)
    _store_heads(
        k + token.to(tl.int64) * stride_k_token,
        stride_k_head,
        k_pages + page * stride_k_page + position % PAGE * D,
        stride_k_page_head,
        k_factor,
        i // D,
        i % D,
        HEADS,
        D,
        FP8,
    )
    if not KEYS_ALONE:
        _store_heads(
            v + token.to(tl.int64) * stride_v_token,
            stride_v_head,
            v_pages + page * stride_v_page + position % PAGE * DV,
            stride_v_page_head,
            v_factor,
            i // DV,
            i % DV,
            HEADS,
            DV,
            FP8,
        )


@triton.jit
def _store_heads(  # type: ignore[no-untyped-def]
    source,
    stride_source_head,
    target,
    stride_target_head,
    factor,
    head,
    d,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    FP8: tl.constexpr,
):
    inside = head < HEADS
    x = tl.load(source + head * stride_source_head + d, mask=inside, other=0.0)
    if FP8:
        x = tl.clamp(x.to(tl.float32) * factor, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(target + head * stride_target_head + d, x.to(target.dtype.element_ty), mask=inside)


@triton.jit
def _load(  # type: ignore[no-untyped-def]
    pages,
    offset,
    keys,
    visible,
    MASKED: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    PAGE: tl.constexpr,
):
    """Return the keys or values [KEYS, D_PADDED] at ``offset``; zeros where none is visible."""
    d = tl.arange(0, D_PADDED)
    pointers = pages + offset[:, None] + (keys % PAGE)[:, None] * D + d[None, :]
    if MASKED and D != D_PADDED:
        return tl.load(pointers, mask=visible[:, None] & (d < D)[None, :], other=0.0)
    elif MASKED:
        return tl.load(pointers, mask=visible[:, None], other=0.0)
    elif D != D_PADDED:
        return tl.load(pointers, mask=(d < D)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _half(q, factor, pages):  # type: ignore[no-untyped-def]
    """Return ``q`` [ROWS, head_dim] in the dtype to compute in, and the factor of the logits.

    fp8 pages are read as f16, so bf16 queries become f16 too, scaled into its range.
    """
    if pages.dtype.element_ty == tl.float8e4nv and q.dtype == tl.bfloat16:
        largest = tl.max(tl.abs(q.to(tl.float32)), 1, keep_dims=True)
        largest = tl.where(largest > 1e-30, largest, 1.0)  # f16 has no number above 65504
        return (q.to(tl.float32) / largest).to(tl.float16), factor * largest
    else:
        return q, factor


@triton.jit
def _numbers(x, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return keys or values from pages in ``dtype``."""
    if x.dtype == tl.float8e4nv and dtype == tl.float16:
        # As impure assembly, this stays before the change of layout. Otherwise Triton would read
        # single bytes in the layout of the dot, and convert those.
        convert: tl.constexpr = (
            "{.reg .b16 a, b; mov.b32 {a, b}, $2; cvt.rn.f16x2.e4m3x2 $0, a; cvt.rn.f16x2.e4m3x2 "
            "$1, b;}"
        )
        return tl.inline_asm_elementwise(convert, "=r,=r,r", [x], tl.float16, is_pure=False, pack=4)
    else:
        return x.to(dtype)


@triton.jit
def _start(sinks, head, has_sink, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the sum and the largest logit of rows before any key: those of their head's sink."""
    if sinks is None:
        return tl.zeros((ROWS,), tl.float32), tl.full((ROWS,), float("-inf"), tl.float32)
    else:
        sink = tl.load(sinks + head, mask=has_sink, other=float("-inf")).to(tl.float32)
        return has_sink.to(tl.float32), sink * 1.4426950408889634


@triton.jit
def _attend_tiles(  # type: ignore[no-untyped-def]
    q,
    acc,
    total,
    top,
    own,
    begin,
    end,
    low,
    last,
    table_row,
    k_pages,
    v_pages,
    stride_k_page,
    stride_v_page,
    q_rope,
    k_rope,
    stride_k_rope,
    factor,
    limit,
    window,
    WINDOWED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    ROPE: tl.constexpr,
    PAGE: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Add tiles ``begin`` to ``end`` - 1 of keys to ``acc``, ``total`` and ``top``.

    ``acc`` [ROWS, v_head_dim] and ``total`` [ROWS] are sums, ``top`` [ROWS] the largest logit.
    ``own`` is the position of each row. ``q`` and ``factor`` come from `_half`. Nothing outside of
    the positions ``low`` to ``last`` is read. Without a table, each token is a page, in order.
    ``q_rope`` and ``k_rope`` hold ``ROPE`` more channels of queries and keys.
    """
    keys = begin * KEYS + tl.arange(0, KEYS)
    page = keys
    if table_row is not None:
        page = tl.load(table_row + keys // PAGE, mask=(keys >= low) & (keys <= last), other=0)
    for _ in tl.range(begin, end, num_stages=STAGES):
        visible = (keys >= low) & (keys <= last)
        next_page = keys + KEYS
        if table_row is not None:
            # a step ahead, so that no load waits for another of its step
            next_page = tl.load(
                table_row + (keys + KEYS) // PAGE, mask=keys + KEYS <= last, other=0
            )
        k = _load(
            k_pages, page.to(tl.int64) * stride_k_page, keys, visible, MASKED, D, q.shape[1], PAGE
        )
        logits = tl.dot(q, tl.trans(_numbers(k, q.dtype)), input_precision="ieee")
        if ROPE:
            offset = page.to(tl.int64) * stride_k_rope
            k = _load(k_rope, offset, keys, visible, MASKED, ROPE, ROPE, PAGE)
            logits = tl.dot(q_rope, tl.trans(k), logits, input_precision="ieee")
        logits *= factor
        if SOFTCAP:
            # limit * tanh, by e^2x = 2^(2.88 x)
            logits = limit - 2 * limit / (tl.exp2(logits * 2.885390081777927) + 1)
        if MASKED:
            seen = keys[None, :] <= own[:, None]
            if WINDOWED:
                seen &= keys[None, :] > own[:, None] - window
            logits = tl.where(seen, logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        # a row's window may begin later
        base = tl.where(new_top == float("-inf"), 0.0, new_top) if MASKED and WINDOWED else new_top
        p = tl.exp2(logits - base[:, None])
        kept = tl.exp2(top - base)
        total = total * kept + tl.sum(p, 1)
        v = _load(
            v_pages,
            page.to(tl.int64) * stride_v_page,
            keys,
            visible,
            MASKED,
            DV,
            acc.shape[1],
            PAGE,
        )
        acc = tl.dot(
            p.to(q.dtype), _numbers(v, q.dtype), acc * kept[:, None], input_precision="ieee"
        )
        top, page, keys = new_top, next_page, keys + KEYS
    return acc, total, top


@triton.jit(**ANY_VALUE)
def _decode(  # type: ignore[no-untyped-def]
    q,
    k_pages,
    v_pages,
    table,
    rows,
    positions,
    out,
    sinks,
    partial,
    sums,
    arrived,
    stride_table_row,
    stride_q_token,
    stride_q_head,
    stride_k_page,
    stride_k_page_head,
    stride_v_page,
    stride_v_page_head,
    factor,
    limit,
    v_scale,
    window,
    least,
    WINDOWED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SHARED: tl.constexpr,
    SHARED_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    DV: tl.constexpr,
    DV_PADDED: tl.constexpr,
    PAGE: tl.constexpr,
    KEYS: tl.constexpr,
    PARTS: tl.constexpr,
    TOGETHER: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    start_early(PDL)
    head, part, token = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(0)
    last = tl.load(positions + token)
    table_row = table + tl.load(rows + token) * stride_table_row
    low = 0
    if WINDOWED:
        low = tl.maximum(last - window + 1, 0)
    first = low // KEYS
    tiles = last // KEYS + 1 - first
    each = tl.maximum(tl.cdiv(tiles, PARTS), tl.minimum(tl.cdiv(tiles, MANY_PARTS), MANY_STEPS))
    each = tl.maximum(each, least)
    parts = tl.cdiv(tiles, each)
    if part >= parts:
        return
    row = tl.arange(0, ROWS)
    d = tl.arange(0, D_PADDED)
    inside = (row < SHARED)[:, None] & (d < D)[None, :]
    queries = tl.load(
        q
        + token.to(tl.int64) * stride_q_token
        + (head * SHARED + row)[:, None] * stride_q_head
        + d[None, :],
        mask=inside,
        other=0.0,
    )
    queries, factor = _half(queries, factor, k_pages)
    begin = first + part * each
    total, top = _start(sinks, head * SHARED + row, (part == 0) & (row < SHARED), ROWS)
    acc, total, top = _attend_tiles(
        queries,
        tl.zeros((ROWS, DV_PADDED), tl.float32),
        total,
        top,
        tl.zeros((ROWS,), tl.int32) + last,
        begin,
        tl.minimum(begin + each, first + tiles),
        low,
        last,
        table_row,
        k_pages + head * stride_k_page_head,
        v_pages + head * stride_v_page_head,
        stride_k_page,
        stride_v_page,
        None,
        None,
        0,
        factor,
        limit,
        window,
        WINDOWED,
        SOFTCAP,
        True,
        D,
        DV,
        0,
        PAGE,
        KEYS,
        STAGES,
    )
    store_part(
        acc,
        total,
        top,
        out,
        partial,
        sums,
        arrived,
        token.to(tl.int64) * heads + head,
        part,
        parts,
        v_scale,
        SHARED,
        SHARED_PADDED,
        DV,
        PARTS,
        TOGETHER,
    )


@triton.jit(**ANY_VALUE)
def prefill_kernel(  # type: ignore[no-untyped-def]
    q,
    q_rope,
    k_pages,
    k_rope,
    v_pages,
    table,
    rows,
    positions,
    starts,
    contexts,
    out,
    sinks,
    decodes,
    stride_table_row,
    stride_out_token,
    stride_q_token,
    stride_q_head,
    stride_q_rope_token,
    stride_q_rope_head,
    stride_k_rope,
    stride_k_page,
    stride_k_page_head,
    stride_v_page,
    stride_v_page_head,
    factor,
    limit,
    v_scale,
    window,
    WINDOWED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SHARED: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    DV: tl.constexpr,
    DV_PADDED: tl.constexpr,
    ROPE: tl.constexpr,
    PAGE: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Fill ``out`` for the tokens of chunks: the kernel of `prefill`, where keys and values are in
    pages, and of `triton_latent.prefill_expanded`, where they lie in the order of their tokens and
    those of each chunk begin at its ``contexts``.
    """
    TOKENS: tl.constexpr = ROWS // SHARED
    start_early(PDL)
    head, chunk = tl.program_id(1), tl.program_id(2)
    start = tl.load(starts + chunk)
    count = tl.load(starts + chunk + 1) - start
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    if block * TOKENS >= count:
        return
    start += decodes
    first = tl.load(positions + start)
    member = tl.arange(0, ROWS)
    token = block * TOKENS + member // SHARED
    valid = (token < count) & (member < TOKENS * SHARED)
    lowest = first + block * TOKENS
    last = first + tl.minimum(block * TOKENS + TOKENS, count) - 1
    own = tl.minimum(first + token, last)
    query_head = head * SHARED + member % SHARED
    d = tl.arange(0, D_PADDED)
    pointers = (
        q
        + (start + token).to(tl.int64)[:, None] * stride_q_token
        + query_head[:, None] * stride_q_head
        + d[None, :]
    )
    queries = tl.load(pointers, mask=valid[:, None] & (d < D)[None, :], other=0.0)
    queries, factor = _half(queries, factor, k_pages)
    acc = tl.zeros((ROWS, DV_PADDED), tl.float32)
    total, top = _start(sinks, query_head, valid, ROWS)
    if ROPE:
        rope = tl.load(
            q_rope
            + (start + token).to(tl.int64)[:, None] * stride_q_rope_token
            + query_head[:, None] * stride_q_rope_head
            + tl.arange(0, ROPE)[None, :],
            mask=valid[:, None],
            other=0.0,
        )
    else:
        rope = None
    if contexts is None:
        table_row = table + tl.load(rows + start) * stride_table_row
    else:
        table_row = None
        context = tl.load(contexts + chunk).to(tl.int64)
        k_pages += context * stride_k_page
        v_pages += context * stride_v_page
        k_rope += context * stride_k_rope
    k_pages += head * stride_k_page_head
    v_pages += head * stride_v_page_head
    end = last // KEYS + 1
    low = 0
    begin = 0
    whole = 0  # tiles from here to `partly` are seen by every row
    if WINDOWED:
        low = tl.maximum(lowest - window + 1, 0)
        begin = low // KEYS
        whole = tl.minimum(tl.cdiv(tl.maximum(last - window + 1, 0), KEYS), end)
    partly = tl.maximum(whole, (lowest + 1) // KEYS)
    bounds = (begin, whole, partly, end)
    for part in tl.static_range(0 if WINDOWED else 1, 3):
        acc, total, top = _attend_tiles(
            queries,
            acc,
            total,
            top,
            own,
            bounds[part],
            bounds[part + 1],
            low,
            last,
            table_row,
            k_pages,
            v_pages,
            stride_k_page,
            stride_v_page,
            rope,
            k_rope,
            stride_k_rope,
            factor,
            limit,
            window,
            WINDOWED,
            SOFTCAP,
            part != 1,
            D,
            DV,
            ROPE,
            PAGE,
            KEYS,
            STAGES,
        )
    dv = tl.arange(0, DV_PADDED)
    offset = (start + token).to(tl.int64) * stride_out_token + query_head * DV
    result = (acc * (v_scale / total)[:, None]).to(out.dtype.element_ty)
    tl.store(out + offset[:, None] + dv[None, :], result, mask=valid[:, None] & (dv < DV)[None, :])
