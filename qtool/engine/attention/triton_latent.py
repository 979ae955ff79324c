"""Attention over paged latents in Triton: one head of latents for all heads of queries.

A latent is key and value at once, and is read once: logits come from all of its numbers and from
the rotary part beside them, and what is gathered are its numbers. Query heads are rows of a tile.

Large chunks attend to keys and values made from the latents that `gather` collects.
"""

# ruff: noqa: N803, N806 (constants of a Triton kernel are written in capitals)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtool.engine.attention import triton_paged
from qtool.engine.attention.pages import LOG2_E, PAGE, KVPages, Packed
from qtool.engine.attention.triton_paged import ANY_VALUE, Tile, launch_options
from qtool.engine.attention.triton_parts import power_of_two, store_part
from qtool.runtime.triton.tiles import GLUON, start_early

ROWS = 16  # heads of a tile, at most


def decode_tile(programs: int, most: int, itemsize: int) -> Tile:
    """Choose for ``programs`` groups of heads of all sequences, of at most ``most`` tokens each."""
    keys = 32 if itemsize < 4 else 16
    parts = 16 if programs <= 64 else power_of_two(512 // programs)
    return Tile(keys, 4, 2, ROWS, max(1, min(parts, triton.cdiv(most, keys))))


def prefill_tile(queries: torch.dtype, latents: torch.dtype) -> Tile:
    """Choose for chunks."""
    if queries == torch.float32:
        return Tile(16, 4, 1, 16)
    # 8 bits become 16 in registers
    return Tile(32, 8, 2, 64 if latents == queries else 32)


def decode(
    q: Tensor, kv: KVPages, packed: Packed, out: Tensor, scaling: float, tile: Tile | None = None
) -> None:
    """Fill ``out`` for the decodes."""
    q, tokens, shared = q.contiguous(), packed.decodes, _heads_of_tile(q.shape[1])
    groups = q.shape[1] // shared
    rank = out.shape[2]
    most = packed.most or packed.table.shape[1] * PAGE
    tile = tile or decode_tile(tokens * groups, most, q.element_size())
    split = tile.parts > 1
    size = tokens * groups * tile.parts * shared if split else 1
    partial = q.new_empty(size * rank if split else 1, dtype=torch.float32)
    sums = q.new_empty(2 * size, dtype=torch.float32)
    counters = packed.counters
    if counters is None or counters.numel() < tokens * groups:
        counters = q.new_zeros(tokens * groups if split else 1, dtype=torch.int32)
    together = 32 * tile.warps * tile.numbers // (triton.next_power_of_2(shared) * rank)
    _decode[(groups, tile.parts, tokens)](
        partial=partial,
        sums=sums,
        arrived=counters,
        least=tile.least,
        SHARED_PADDED=triton.next_power_of_2(shared),
        PARTS=tile.parts,
        TOGETHER=max(1, min(triton.next_power_of_2(tile.parts), together)),
        **_inputs(q, kv, packed, out, scaling, shared, tile),
    )


def prefill(
    q: Tensor, kv: KVPages, packed: Packed, out: Tensor, scaling: float, tile: Tile | None = None
) -> None:
    """Fill ``out`` for the tokens of chunks."""
    assert packed.starts is not None
    q, shared = q.contiguous(), _heads_of_tile(q.shape[1])
    tile = tile or prefill_tile(q.dtype, kv.k.dtype)
    grid = (
        triton.cdiv(packed.longest, tile.rows // shared),
        q.shape[1] // shared,
        packed.starts.numel() - 1,
    )
    _prefill[grid](
        starts=packed.starts,
        decodes=packed.decodes,
        **_inputs(q, kv, packed, out, scaling, shared, tile),
    )


def gather(kv: KVPages, packed: Packed, dtype: torch.dtype) -> Tensor:
    """Return the latents of the contexts of ``packed.expanded`` side by side, and the rotary part
    of their keys: [keys, rank + rotary].
    """
    expanded = packed.expanded
    assert expanded is not None
    rank = kv.v.shape[3]
    width = kv.k.shape[3]
    gathered = torch.empty(expanded.keys, width, dtype=dtype, device=kv.k.device)
    _gather[(triton.cdiv(expanded.longest, PAGE), expanded.chunks)](
        pages=kv.k,
        table=packed.table,
        rows=packed.rows,
        positions=packed.positions,
        starts=packed.starts_of(expanded),
        contexts=expanded.contexts,
        out=gathered,
        decodes=packed.decodes,
        stride_table_row=packed.table.shape[1],
        stride_page=kv.k.stride(0),
        scale=kv.k_scale,
        RANK=rank,
        ROTARY=width - rank,
        PAGE=PAGE,
        **launch_options(4, 1, True, gathered),
    )
    return gathered


def prefill_expanded(
    q: Tensor,
    q_rope: Tensor,
    expanded_kv: Tensor,
    latents: Tensor,
    packed: Packed,
    out: Tensor,
    scaling: float,
    tile: Tile | None = None,
) -> None:
    """Fill ``out`` for the tokens of the chunks of ``packed.expanded``.

    Args:
        q: queries of all tokens without their rotary part, [T, heads, key width].
        q_rope: the rotary part, [T, heads, rotary].
        expanded_kv: keys and values made from ``latents``, [keys, heads * (key width + value
            width)].
        latents: from `gather`; the rotary part of the keys is read.
        packed: the tokens of the pass.
        out: [T, heads, value width], of any stride between tokens.
        scaling: what logits are multiplied with.
        tile: how the work is cut; None: the best tile, in the fastest kernel that applies.
    """
    expanded = packed.expanded
    assert expanded is not None
    heads = q.shape[1]
    key = q.shape[2]
    value = out.shape[2]
    width = q_rope.shape[2]
    if tile is None and GLUON and triton_paged.is_hopper(q.device):
        from qtool.engine.attention import gluon_prefill

        if gluon_prefill.applies_to_expanded(q, q_rope, expanded_kv, out):
            gluon_prefill.prefill_expanded(
                q,
                q_rope,
                expanded_kv,
                latents,
                packed,
                out,
                factor=scaling * LOG2_E,
                launch=launch_options(4, 1, True, q),
            )
            return
    tile = tile or triton_paged.prefill_tile(max(key, value), q.element_size())
    values = expanded_kv[:, key:]
    triton_paged.prefill_kernel[(triton.cdiv(packed.longest, tile.rows), heads, expanded.chunks)](
        q=q,
        q_rope=q_rope,
        k_pages=expanded_kv,
        k_rope=latents[:, -width:],
        v_pages=values,
        table=packed.table,
        rows=packed.rows,
        positions=packed.positions,
        starts=packed.starts_of(expanded),
        contexts=expanded.contexts,
        out=out,
        sinks=None,
        decodes=packed.decodes,
        stride_table_row=packed.table.shape[1],
        stride_out_token=out.stride(0),
        stride_q_token=q.stride(0),
        stride_q_head=q.stride(1),
        stride_q_rope_token=q_rope.stride(0),
        stride_q_rope_head=q_rope.stride(1),
        stride_k_rope=latents.stride(0),
        stride_k_page=expanded_kv.stride(0),
        stride_k_page_head=key + value,
        stride_v_page=expanded_kv.stride(0),
        stride_v_page_head=key + value,
        factor=scaling * LOG2_E,
        limit=0.0,
        v_scale=1.0,
        window=0,
        WINDOWED=False,
        SOFTCAP=False,
        SHARED=1,
        ROWS=tile.rows,
        D=key,
        D_PADDED=max(16, triton.next_power_of_2(key)),
        DV=value,
        DV_PADDED=max(16, triton.next_power_of_2(value)),
        ROPE=width,
        PAGE=1,
        KEYS=tile.keys,
        STAGES=tile.stages,
        **launch_options(tile.warps, tile.stages, tile.pdl, q),
    )


def _heads_of_tile(heads: int) -> int:
    """Return how many heads share a tile: so many that all tiles have as many."""
    return max(count for count in range(1, ROWS + 1) if heads % count == 0)


def _inputs(
    q: Tensor, kv: KVPages, packed: Packed, out: Tensor, scaling: float, shared: int, tile: Tile
) -> dict[str, object]:
    """Return the arguments that both kernels share, by name."""
    return {
        "q": q,
        "pages": kv.k,
        "table": packed.table,
        "rows": packed.rows,
        "positions": packed.positions,
        "out": out,
        "stride_table_row": packed.table.shape[1],
        "stride_page": kv.k.stride(0),
        "factor": scaling * kv.k_scale * LOG2_E,
        "scale": kv.k_scale,
        "SHARED": shared,
        "ROWS": tile.rows,
        "RANK": out.shape[2],
        "ROTARY": q.shape[2] - out.shape[2],
        "PAGE": PAGE,
        "KEYS": tile.keys,
        "STAGES": tile.stages,
        **launch_options(tile.warps, tile.stages, True, q),
    }


@triton.jit
def _load_queries(  # type: ignore[no-untyped-def]
    q, token, head, inside, heads, RANK: tl.constexpr, ROTARY: tl.constexpr
):
    """Return the parts of the queries of rows for latents and for rotary parts."""
    pointers = q + (token.to(tl.int64) * heads + head) * (RANK + ROTARY)
    latent = tl.load(
        pointers[:, None] + tl.arange(0, RANK)[None, :], mask=inside[:, None], other=0.0
    )
    rotary = tl.load(
        pointers[:, None] + RANK + tl.arange(0, ROTARY)[None, :], mask=inside[:, None], other=0.0
    )
    return latent, rotary


@triton.jit
def _attend_tiles(  # type: ignore[no-untyped-def]
    latent,
    rotary,
    own,
    begin,
    end,
    last,
    table_row,
    pages,
    stride_page,
    factor,
    RANK: tl.constexpr,
    ROTARY: tl.constexpr,
    PAGE: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Return the sum of latents, the sum of weights and the largest logit of rows over tiles
    ``begin`` to ``end`` - 1; ``own`` is the position of each row, ``last`` the largest.
    """
    ROWS: tl.constexpr = latent.shape[0]
    acc = tl.zeros((ROWS, RANK), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    keys = begin * KEYS + tl.arange(0, KEYS)
    page = tl.load(table_row + keys // PAGE, mask=keys <= last, other=0)
    for _ in tl.range(begin, end, num_stages=STAGES):
        visible = (keys <= last)[:, None]
        # a step ahead, so that no load waits for another of its step
        next_page = tl.load(table_row + (keys + KEYS) // PAGE, mask=keys + KEYS <= last, other=0)
        pointers = pages + page.to(tl.int64) * stride_page + (keys % PAGE) * (RANK + ROTARY)
        kept = tl.load(pointers[:, None] + tl.arange(0, RANK)[None, :], mask=visible, other=0.0)
        k_rope = tl.load(
            pointers[:, None] + RANK + tl.arange(0, ROTARY)[None, :], mask=visible, other=0.0
        )
        kept, k_rope = kept.to(latent.dtype), k_rope.to(latent.dtype)
        logits = tl.dot(latent, tl.trans(kept), input_precision="ieee")
        logits = tl.dot(rotary, tl.trans(k_rope), logits, input_precision="ieee") * factor
        logits = tl.where(keys[None, :] <= own[:, None], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(logits - base[:, None])
        left = tl.exp2(top - base)
        total = total * left + tl.sum(weights, 1)
        acc = tl.dot(weights.to(latent.dtype), kept, acc * left[:, None], input_precision="ieee")
        top, page, keys = new_top, next_page, keys + KEYS
    return acc, total, top


@triton.jit(**ANY_VALUE)
def _decode(  # type: ignore[no-untyped-def]
    q,
    pages,
    table,
    rows,
    positions,
    out,
    partial,
    sums,
    arrived,
    stride_table_row,
    stride_page,
    factor,
    scale,
    least,
    SHARED: tl.constexpr,
    SHARED_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    RANK: tl.constexpr,
    ROTARY: tl.constexpr,
    PAGE: tl.constexpr,
    KEYS: tl.constexpr,
    PARTS: tl.constexpr,
    TOGETHER: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    start_early(PDL)
    group, part, token = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    groups = tl.num_programs(0)
    last = tl.load(positions + token)
    tiles = last // KEYS + 1
    each = tl.maximum(tl.cdiv(tiles, PARTS), least)
    parts = tl.cdiv(tiles, each)
    if part >= parts:
        return
    row = tl.arange(0, ROWS)
    tokens = tl.zeros((ROWS,), tl.int32) + token
    latent, rotary = _load_queries(
        q, tokens, group * SHARED + row, row < SHARED, groups * SHARED, RANK, ROTARY
    )
    begin = part * each
    acc, total, top = _attend_tiles(
        latent,
        rotary,
        tl.zeros((ROWS,), tl.int32) + last,
        begin,
        tl.minimum(begin + each, tiles),
        last,
        table + tl.load(rows + token) * stride_table_row,
        pages,
        stride_page,
        factor,
        RANK,
        ROTARY,
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
        token.to(tl.int64) * groups + group,
        part,
        parts,
        scale,
        SHARED,
        SHARED_PADDED,
        RANK,
        PARTS,
        TOGETHER,
    )


@triton.jit(**ANY_VALUE)
def _prefill(  # type: ignore[no-untyped-def]
    q,
    pages,
    table,
    rows,
    positions,
    starts,
    out,
    decodes,
    stride_table_row,
    stride_page,
    factor,
    scale,
    SHARED: tl.constexpr,
    ROWS: tl.constexpr,
    RANK: tl.constexpr,
    ROTARY: tl.constexpr,
    PAGE: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    TOKENS: tl.constexpr = ROWS // SHARED
    start_early(PDL)
    group, chunk = tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1) * SHARED
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
    last = first + tl.minimum(block * TOKENS + TOKENS, count) - 1
    head = group * SHARED + member % SHARED
    latent, rotary = _load_queries(q, start + token, head, valid, heads, RANK, ROTARY)
    acc, total, _ = _attend_tiles(
        latent,
        rotary,
        tl.minimum(first + token, last),
        0,
        last // KEYS + 1,
        last,
        table + tl.load(rows + start) * stride_table_row,
        pages,
        stride_page,
        factor,
        RANK,
        ROTARY,
        PAGE,
        KEYS,
        STAGES,
    )
    out_rows = (start + token).to(tl.int64) * heads + head
    result = (acc * (scale / total)[:, None]).to(out.dtype.element_ty)
    tl.store(
        out + out_rows[:, None] * RANK + tl.arange(0, RANK)[None, :], result, mask=valid[:, None]
    )


@triton.jit(**ANY_VALUE)
def _gather(  # type: ignore[no-untyped-def]
    pages,
    table,
    rows,
    positions,
    starts,
    contexts,
    out,
    decodes,
    stride_table_row,
    stride_page,
    scale,
    RANK: tl.constexpr,
    ROTARY: tl.constexpr,
    PAGE: tl.constexpr,
    PDL: tl.constexpr,
):
    start_early(PDL)
    number, chunk = tl.program_id(0), tl.program_id(1)
    start, stop = tl.load(starts + chunk), tl.load(starts + chunk + 1)
    if start == stop:
        return
    last = tl.load(positions + decodes + stop - 1)
    if number * PAGE > last:
        return
    row = tl.load(rows + decodes + start)
    page = tl.load(table + row.to(tl.int64) * stride_table_row + number).to(tl.int64)
    slot = tl.arange(0, PAGE)
    inside = (number * PAGE + slot <= last)[:, None]
    key = tl.load(contexts + chunk) + number * PAGE + slot
    source = pages + page * stride_page + (slot * (RANK + ROTARY))[:, None]
    target = out + (key.to(tl.int64) * (RANK + ROTARY))[:, None]
    i = tl.arange(0, RANK)[None, :]
    latent = tl.load(source + i, mask=inside, other=0.0).to(tl.float32) * scale
    tl.store(target + i, latent.to(out.dtype.element_ty), mask=inside)
    i = RANK + tl.arange(0, ROTARY)[None, :]
    k_rope = tl.load(source + i, mask=inside, other=0.0).to(tl.float32) * scale
    tl.store(target + i, k_rope.to(out.dtype.element_ty), mask=inside)
