"""Prefill of chunks in Gluon for sm_90: one warp loads pages, two groups of four warps attend.

Each group has 64 rows. It computes its next logits while it takes the exponentials of the last
ones, as FlashAttention-3 does (Shah et al. 2024, arXiv:2407.08608). Programs are persistent and
draw blocks of queries from a counter, so that loads of the next block begin before one is done.

Keys and values made from latents are not in pages: [tokens, heads, key width + value width], with
the rotary part of the keys, which all heads share, in a tensor of its own.
"""

# Constants of a kernel are written in capitals; Gluon has no stars in lists.
# ruff: noqa: N803, N806, RUF005
from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qtool.engine.attention.pages import PAGE, KVPages, Packed
from qtool.runtime.triton.tiles import multiprocessors

TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
ROWS = 64  # of a group: queries, times the heads that are computed together
KEYS = 128  # of a step
STAGES = 2
WIDE = 64  # elements of a row that lie together in shared memory: 128 bytes, swizzled
# the groups issue products in turns, so that one multiplies while the other takes exponentials
TURNS = True


def applies(q: Tensor, kv: KVPages, out: Tensor, window: int | None, softcap: float | None) -> bool:
    """Whether `prefill` supports this attention."""
    if window is not None or softcap:
        return False
    if not q.dtype == kv.k.dtype == kv.v.dtype == out.dtype or q.dtype not in TYPES:
        return False
    if q.shape[2] != out.shape[2] or q.shape[2] not in (64, 128):
        return False
    # whole 16 bytes, as TMA needs them
    aligned = q.stride(0) % 8 == q.stride(1) % 8 == q.data_ptr() % 16 == 0
    return aligned and all(part.is_contiguous() for part in (kv.k, kv.v, out))


def prefill(
    q: Tensor,
    kv: KVPages,
    packed: Packed,
    out: Tensor,
    *,
    factor: float,
    v_scale: float,
    launch: Mapping[str, int | bool],
) -> None:
    """Fill ``out`` for the tokens of chunks, if this `applies`. See `triton_paged.prefill`.

    Args:
        q: queries of all tokens, [T, heads, D].
        kv: the pages of the layer, in the dtype of ``q``.
        packed: the tokens of the pass.
        out: [T, heads, D], contiguous.
        factor: what logits are multiplied with, in units of log2.
        v_scale: what results are multiplied with.
        launch: from `triton_paged.launch_options`.
    """
    assert packed.starts is not None
    tokens, heads, head_dim = q.shape
    kv_heads = kv.k.shape[1]
    chunks = packed.starts.numel() - 1
    shared = heads // kv_heads
    together = min(shared & -shared, 16)  # heads of a block: the largest power of two that divides
    counter = packed.counters if packed.counters is not None else q.new_zeros(1, dtype=torch.int32)
    blocks = (
        heads // together * (triton.cdiv((tokens - packed.decodes) * together, 2 * ROWS) + chunks)
    )
    k_pages, v_pages = (_rows(part.view(-1, head_dim), PAGE) for part in (kv.k, kv.v))
    _prefill[(min(multiprocessors(q.device), blocks),)](
        q=_queries(q, together),
        q_rope=None,
        k=k_pages,
        k_rope=None,
        v=v_pages,
        contexts=None,
        table=packed.table,
        rows=packed.rows,
        positions=packed.positions,
        starts=packed.starts,
        counter=counter,
        out=out,
        decodes=packed.decodes,
        chunks=chunks,
        stride_table_row=packed.table.shape[1],
        stride_out_token=out.stride(0),
        heads=heads // together,
        kv_heads=kv_heads,
        factor=factor,
        v_scale=v_scale,
        SHARE=shared // together,
        D=head_dim,
        DV=head_dim,
        RANK=0,
        KEYS=KEYS,
        STAGES=STAGES,
        TURNS=TURNS,
        **launch,
    )


def applies_to_expanded(q: Tensor, q_rope: Tensor, expanded_kv: Tensor, out: Tensor) -> bool:
    """Whether `prefill_expanded` supports this attention."""
    if not q.dtype == q_rope.dtype == expanded_kv.dtype == out.dtype or q.dtype not in TYPES:
        return False
    key = q.shape[2]
    value = out.shape[2]
    if key not in (64, 128) or value not in (64, 128) or q_rope.shape[2] != WIDE:
        return False
    parts = (q, q_rope, expanded_kv)
    return all(
        part.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in part.stride()[:-1])
        for part in parts
    )


def prefill_expanded(
    q: Tensor,
    q_rope: Tensor,
    expanded_kv: Tensor,
    latents: Tensor,
    packed: Packed,
    out: Tensor,
    *,
    factor: float,
    launch: Mapping[str, int | bool],
) -> None:
    """Fill ``out`` for the tokens of chunks, if this `applies_to_expanded`.

    Args:
        q: as in `triton_latent.prefill_expanded`, as are the arguments up to ``out``.
        factor: as in `prefill`.
        launch: as in `prefill`.
    """
    expanded = packed.expanded
    assert expanded is not None
    starts = packed.starts_of(expanded)
    tokens, heads, key = q.shape
    width = q_rope.shape[2]
    counter = packed.counters if packed.counters is not None else q.new_zeros(1, dtype=torch.int32)
    blocks = heads * (triton.cdiv(tokens - expanded.token, 2 * ROWS) + expanded.chunks)
    rows = _rows(expanded_kv, KEYS)
    _prefill[(min(multiprocessors(q.device), blocks),)](
        q=_queries(q, 1),
        q_rope=_queries(q_rope, 1),
        k=rows,
        k_rope=_rows(latents, KEYS),
        v=rows,
        contexts=expanded.contexts,
        table=packed.table,
        rows=packed.rows,
        positions=packed.positions,
        starts=starts,
        counter=counter,
        out=out,
        decodes=packed.decodes,
        chunks=expanded.chunks,
        stride_table_row=packed.table.shape[1],
        stride_out_token=out.stride(0),
        heads=heads,
        kv_heads=1,
        factor=factor,
        v_scale=1.0,
        SHARE=1,
        D=key,
        DV=out.shape[2],
        RANK=latents.shape[1] - width,
        KEYS=KEYS,
        STAGES=STAGES,
        TURNS=TURNS,
        **launch,
    )


def _queries(q: Tensor, together: int) -> TensorDescriptor:
    """Return the TMA descriptor of ``together`` heads of half a block of tokens."""
    return TensorDescriptor.from_tensor(q, [ROWS // together, together, WIDE], _layout(q, 3))


def _rows(x: Tensor, count: int) -> TensorDescriptor:
    """Return the TMA descriptor of ``count`` rows of ``x``, keys or values."""
    return TensorDescriptor.from_tensor(x, [count, WIDE], _layout(x, 2))


def _layout(x: Tensor, rank: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(
        swizzle_byte_width=128, element_bitwidth=8 * x.element_size(), rank=rank
    )


@gluon.jit(
    do_not_specialize=["decodes", "chunks", "stride_table_row", "heads"],
    do_not_specialize_on_alignment=[
        *("table", "rows", "positions", "starts", "contexts", "counter")
    ],
)
def _prefill(  # type: ignore[no-untyped-def]
    q,
    q_rope,
    k,
    k_rope,
    v,
    contexts,
    table,
    rows,
    positions,
    starts,
    counter,
    out,
    decodes,
    chunks,
    stride_table_row,
    stride_out_token,
    heads,
    kv_heads,
    factor,
    v_scale,
    SHARE: gl.constexpr,
    D: gl.constexpr,
    DV: gl.constexpr,
    RANK: gl.constexpr,
    KEYS: gl.constexpr,
    STAGES: gl.constexpr,
    TURNS: gl.constexpr,
    PDL: gl.constexpr,
):
    """Attend with blocks of tokens times ``heads``; ``SHARE`` of these read the same KV head.

    With ``contexts`` keys and values are rows, and the rotary part of the keys begins at column
    ``RANK`` of ``k_rope``.
    """
    PARTS: gl.constexpr = D // q.block_type.shape[2]
    V_PARTS: gl.constexpr = DV // q.block_type.shape[2]
    PAGES: gl.constexpr = KEYS // k.block_type.shape[0]
    TOGETHER: gl.constexpr = q.block_type.shape[1]
    if PDL:
        gdc_launch_dependents()
    queries = gl.allocate_shared_memory(q.dtype, [2 * PARTS] + q.block_type.shape, q.layout)
    keys = gl.allocate_shared_memory(
        k.dtype, [STAGES * PARTS * PAGES] + k.block_type.shape, k.layout
    )
    values = gl.allocate_shared_memory(
        v.dtype, [STAGES * V_PARTS * PAGES] + v.block_type.shape, v.layout
    )
    if contexts is None:
        rope = (queries, keys)  # placeholders
    else:
        rope = (
            gl.allocate_shared_memory(q.dtype, [2] + q_rope.block_type.shape, q_rope.layout),
            gl.allocate_shared_memory(k.dtype, [STAGES] + k_rope.block_type.shape, k.layout),
        )
    mail = gl.allocate_shared_memory(gl.int32, [4, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    # queries (and mail), keys and values have arrived; both groups are done with them; whose turn
    # it is
    queries_in, queries_out, first_turn, second_turn = (
        _barriers(1, 1),
        _barriers(1, 2),
        _barriers(1, 1),
        _barriers(1, 1),
    )
    keys_in, keys_out, values_in, values_out = (
        _barriers(STAGES, 1),
        _barriers(STAGES, 2),
        _barriers(STAGES, 1),
        _barriers(STAGES, 2),
    )
    filled, emptied = (
        (queries_in.index(0), keys_in, values_in),
        (queries_out.index(0), keys_out, values_out),
    )
    turns = (first_turn.index(0), second_turn.index(0))
    gl.warp_specialize(
        [
            (
                _attend,
                (
                    0,
                    queries,
                    keys,
                    values,
                    rope,
                    mail,
                    filled,
                    emptied,
                    turns,
                    out,
                    stride_out_token,
                    factor,
                    v_scale,
                    TOGETHER,
                    D,
                    DV,
                    contexts is not None,
                    KEYS,
                    STAGES,
                    TURNS,
                ),
            ),
            (
                _attend,
                (
                    1,
                    queries,
                    keys,
                    values,
                    rope,
                    mail,
                    filled,
                    emptied,
                    turns,
                    out,
                    stride_out_token,
                    factor,
                    v_scale,
                    TOGETHER,
                    D,
                    DV,
                    contexts is not None,
                    KEYS,
                    STAGES,
                    TURNS,
                ),
            ),
            (
                _load,
                (
                    q,
                    q_rope,
                    k,
                    k_rope,
                    v,
                    queries,
                    keys,
                    values,
                    rope,
                    mail,
                    filled,
                    emptied,
                    contexts,
                    table,
                    rows,
                    positions,
                    starts,
                    counter,
                    decodes,
                    chunks,
                    stride_table_row,
                    heads,
                    kv_heads,
                    SHARE,
                    D,
                    DV,
                    RANK,
                    KEYS,
                    STAGES,
                    PDL,
                ),
            ),
        ],
        [4, 1],
        [224, 56],  # registers; the first group also gets 224
    )


@gluon.jit
def _barriers(STAGES: gl.constexpr, COUNT: gl.constexpr):  # type: ignore[no-untyped-def]
    made = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(made.index(stage), count=COUNT)
    return made


@gluon.jit
def _sum(a, b):  # type: ignore[no-untyped-def]
    return a + b


@gluon.jit
def _find(index, starts, contexts, chunks, TOKENS: gl.constexpr):  # type: ignore[no-untyped-def]
    """Return start and size of the chunk with block ``index``, the block's number, the total, and
    where the chunk's context begins.

    The number counts in the chunk, from its last block, which sees most keys; -1: no chunk has it.
    """
    lane = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    start, count, block, total, context = 0, 0, -1, 0, 0
    for base in range(0, chunks, 32):
        inside = base + lane < chunks
        begin = gl.load(starts + base + lane, mask=inside, other=0)
        size = gl.load(starts + base + lane + 1, mask=inside, other=0) - begin
        blocks = (size + TOKENS - 1) // TOKENS
        upto = total + gl.associative_scan(blocks, 0, _sum)
        here = (upto > index) & (upto - blocks <= index)
        start += gl.sum(gl.where(here, begin, 0), 0)
        count += gl.sum(gl.where(here, size, 0), 0)
        block += gl.sum(gl.where(here, upto - index, 0), 0)
        total += gl.sum(blocks, 0)
        if contexts is not None:
            first = gl.load(contexts + base + lane, mask=here, other=0)
            context += gl.sum(first, 0)
    return start, count, block, total, context


@gluon.jit
def _work(  # type: ignore[no-untyped-def]
    item,
    rows,
    positions,
    starts,
    contexts,
    decodes,
    chunks,
    heads,
    TOKENS: gl.constexpr,
):
    """Return the first token of block ``item``, how many tokens its chunk has from there on, its
    position, its row of the table, or of keys where contexts begin, and the number of blocks; 0
    tokens if no block is left.
    """
    start, count, block, total, row = _find(item // heads, starts, contexts, chunks, TOKENS)
    there = block >= 0
    position = gl.load(positions + decodes + start, mask=there, other=0)
    if contexts is None:
        row = gl.load(rows + decodes + start, mask=there, other=0)
    left = gl.where(there, count - block * TOKENS, 0)
    return decodes + start + block * TOKENS, left, position + block * TOKENS, row, total * heads


@gluon.jit
def _load(  # type: ignore[no-untyped-def]
    q,
    q_rope,
    k,
    k_rope,
    v,
    queries,
    keys,
    values,
    rope,
    mail,
    filled,
    emptied,
    contexts,
    table,
    rows,
    positions,
    starts,
    counter,
    decodes,
    chunks,
    stride_table_row,
    heads,
    kv_heads,
    SHARE: gl.constexpr,
    D: gl.constexpr,
    DV: gl.constexpr,
    RANK: gl.constexpr,
    KEYS: gl.constexpr,
    STAGES: gl.constexpr,
    PDL: gl.constexpr,
):
    """Draw blocks of queries, mail them to the groups, and load what these need.

    Each load starts as soon as both groups are done with its place in shared memory.
    """
    HALF: gl.constexpr = q.block_type.shape[0]
    TOGETHER: gl.constexpr = q.block_type.shape[1]
    WIDE: gl.constexpr = q.block_type.shape[2]
    PAGE: gl.constexpr = k.block_type.shape[0]
    PARTS: gl.constexpr = D // WIDE
    V_PARTS: gl.constexpr = DV // WIDE
    PAGES: gl.constexpr = KEYS // PAGE
    EXPANDED: gl.constexpr = contexts is not None
    queries_in, keys_in, values_in = filled
    queries_out, keys_out, values_out = emptied
    rope_queries, rope_keys = rope
    LETTER: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    if PDL:
        gdc_wait()  # the groups do nothing before the first mail
    item = gl.program_id(0)
    token, left, position, row, total = _work(
        item, rows, positions, starts, contexts, decodes, chunks, heads, 2 * HALF
    )
    number, step = 0, 0
    while left > 0:
        head = item % heads
        mbarrier.wait(queries_out, (number + 1) % 2)  # at first nothing is waited for
        mail.index(0).store(gl.full([1], token, gl.int32, LETTER))
        mail.index(1).store(gl.full([1], left, gl.int32, LETTER))
        mail.index(2).store(gl.full([1], position, gl.int32, LETTER))
        mail.index(3).store(gl.full([1], head, gl.int32, LETTER))
        gl.thread_barrier()
        mbarrier.expect(queries_in, 2 * (PARTS + EXPANDED) * q.block_type.nbytes)
        for i in gl.static_range(2 * PARTS):
            corner = [token + i // PARTS * HALF, head * TOGETHER, i % PARTS * WIDE]
            tma.async_copy_global_to_shared(q, corner, queries_in, queries.index(i))
        if EXPANDED:
            for i in gl.static_range(2):
                corner = [token + i * HALF, head, 0]
                tma.async_copy_global_to_shared(q_rope, corner, queries_in, rope_queries.index(i))
        last = position + gl.minimum(left, 2 * HALF) - 1
        tiles = last // KEYS + 1
        next_item = item
        next_token, next_left, next_position, next_row = token, left, position, row
        for tile in range(tiles):
            stage = step % STAGES
            phase = (step // STAGES + 1) % 2
            first = tile * PAGES
            pages = (row + tile * KEYS,)
            column = head * (D + DV)
            if not EXPANDED:
                pages = ()  # type: ignore[assignment]
                column = 0
                for i in gl.static_range(PAGES):
                    inside = (first + i) * PAGE <= last
                    page = gl.load(
                        table + row.to(gl.int64) * stride_table_row + first + i,
                        mask=inside,
                        other=0,
                    )
                    # Keys outside become zeros: old numbers of a page might be NaN.
                    pages = pages + (
                        gl.where(inside, (page * kv_heads + head // SHARE) * PAGE, k.shape[0]),
                    )  # type: ignore[assignment]
            loaded = keys_in.index(stage)
            mbarrier.wait(keys_out.index(stage), phase)
            mbarrier.expect(loaded, (PARTS * PAGES + EXPANDED) * k.block_type.nbytes)
            if EXPANDED:
                tma.async_copy_global_to_shared(
                    k_rope, [pages[0], RANK], loaded, rope_keys.index(stage)
                )
            for i in gl.static_range(PARTS * PAGES):
                tma.async_copy_global_to_shared(
                    k,
                    [pages[i % PAGES], column + i // PAGES * WIDE],
                    loaded,
                    keys.index(stage * PARTS * PAGES + i),
                )
            loaded = values_in.index(stage)
            mbarrier.wait(values_out.index(stage), phase)
            mbarrier.expect(loaded, V_PARTS * PAGES * v.block_type.nbytes)
            if EXPANDED:
                column += D
            for i in gl.static_range(V_PARTS * PAGES):
                tma.async_copy_global_to_shared(
                    v,
                    [pages[i % PAGES], column + i // PAGES * WIDE],
                    loaded,
                    values.index(stage * V_PARTS * PAGES + i),
                )
            step += 1
            if tile == gl.minimum(tiles, STAGES) - 1:  # while all stages are full
                drawn = gl.atomic_add(counter, 1)
                if drawn == total - 1:  # nobody will draw again
                    gl.store(counter, 0)
                next_item = gl.num_programs(0) + drawn
                next_token, next_left, next_position, next_row, _ = _work(
                    next_item, rows, positions, starts, contexts, decodes, chunks, heads, 2 * HALF
                )
        item = next_item
        token, left, position, row = next_token, next_left, next_position, next_row
        number += 1
    mbarrier.wait(queries_out, (number + 1) % 2)
    mail.index(1).store(gl.full([1], 0, gl.int32, LETTER))
    gl.thread_barrier()
    mbarrier.arrive(queries_in)


@gluon.jit
def _read(mail, I: gl.constexpr):  # type: ignore[no-untyped-def]  # noqa: E741
    return gl.max(mail.index(I).load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def _soften(  # type: ignore[no-untyped-def]
    logits,
    top,
    total,
    factor,
    own,
    keys,
    MASKED: gl.constexpr,
    dtype: gl.constexpr,
    OPERAND: gl.constexpr,
):
    """Return the weights of ``keys``, the new ``top`` and ``total``, and the factor of old sums."""
    if MASKED:
        logits = gl.where(keys[None, :] <= own[:, None], logits, float("-inf"))
    new_top = gl.maximum(top, gl.max(logits, 1))
    base = new_top * factor
    weights = gl.exp2(logits * factor - base[:, None])
    kept = gl.exp2(top * factor - base)
    return (
        gl.convert_layout(weights.to(dtype), OPERAND, assert_trivial=True),
        new_top,
        total * kept + gl.sum(weights, 1),
        kept,
    )


@gluon.jit
def _multiply(  # type: ignore[no-untyped-def]
    queries, keys, rope_queries, rope_keys, stage, none, EXPANDED: gl.constexpr
):
    """Start the products of queries with the keys of ``stage``; return the logits to come."""
    logits = warpgroup_mma(
        queries, keys.index(stage).permute((1, 0)), none, use_acc=False, is_async=True
    )
    if EXPANDED:
        logits = warpgroup_mma(
            rope_queries, rope_keys.index(stage).permute((1, 0)), logits, is_async=True
        )
    return logits


@gluon.jit
def _attend(  # type: ignore[no-untyped-def]
    GROUP: gl.constexpr,
    queries,
    keys,
    values,
    rope,
    mail,
    filled,
    emptied,
    turns,
    out,
    stride_out_token,
    factor,
    v_scale,
    TOGETHER: gl.constexpr,
    D: gl.constexpr,
    DV: gl.constexpr,
    EXPANDED: gl.constexpr,
    KEYS: gl.constexpr,
    STAGES: gl.constexpr,
    TURNS: gl.constexpr,
):
    """Compute half the rows of all blocks, the first or the second by ``GROUP``."""
    ROWS: gl.constexpr = queries.shape[1] * TOGETHER
    TOKENS: gl.constexpr = 2 * queries.shape[1]
    PAGE: gl.constexpr = keys.shape[1]
    WIDE: gl.constexpr = keys.shape[2]
    V_PARTS: gl.constexpr = DV // WIDE
    PAGES: gl.constexpr = KEYS // PAGE
    dtype: gl.constexpr = keys.dtype
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])  # noqa: E741
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    BLOCKED: gl.constexpr = gl.BlockedLayout(
        [8, 8], [2, 16] if DV == 128 else [4, 8], [4, 1], [1, 0]
    )
    # to change the layout takes shared memory, which then is full
    STORED: gl.constexpr = O if EXPANDED else BLOCKED
    CLEANED: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    queries_in, keys_in, values_in = filled
    queries_out, keys_out, values_out = emptied
    my_queries = queries._reinterpret(dtype, [2, ROWS, D], keys.layout).index(GROUP)
    all_keys = keys._reinterpret(dtype, [STAGES, KEYS, D], keys.layout)
    all_values = values._reinterpret(dtype, [STAGES, KEYS, DV], values.layout)
    my_rope_queries = my_queries
    rope_keys = all_keys
    if EXPANDED:
        my_rope_queries = rope[0]._reinterpret(dtype, [2, ROWS, WIDE], keys.layout).index(GROUP)
        rope_keys = rope[1]
    none = gl.zeros((ROWS, KEYS), gl.float32, S)
    key = gl.arange(0, KEYS, gl.SliceLayout(0, S))
    mine = (
        GROUP * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, S))
    ) // TOGETHER  # the token of a row
    number, step, turn = 0, 0, 1 - GROUP
    mbarrier.wait(queries_in, 0)
    left = _read(mail, 1)
    while left > 0:
        token, position, head = _read(mail, 0), _read(mail, 2), _read(mail, 3)
        last = position + gl.minimum(left, TOKENS) - 1
        own = gl.minimum(position + mine, last)
        tiles = last // KEYS + 1
        # tiles from here on are not seen by every row
        whole = gl.maximum((position + 1) // KEYS, 1)
        # The first tile.
        stage = step % STAGES
        mbarrier.wait(keys_in.index(stage), step // STAGES % 2)
        if TURNS:
            mbarrier.wait(turns[GROUP], turn)
        logits = _multiply(my_queries, all_keys, my_rope_queries, rope_keys, stage, none, EXPANDED)
        if TURNS:
            gl.thread_barrier()
            mbarrier.arrive(turns[1 - GROUP])
            turn ^= 1
        logits = warpgroup_mma_wait(0, deps=[logits])
        gl.thread_barrier()  # in all four warps
        mbarrier.arrive(keys_out.index(stage))
        top = gl.full((ROWS,), float("-inf"), gl.float32, gl.SliceLayout(1, S))
        total = gl.zeros((ROWS,), gl.float32, gl.SliceLayout(1, S))
        weights, top, total, _ = _soften(logits, top, total, factor, own, key, True, dtype, OPERAND)
        acc = gl.zeros((ROWS, DV), gl.float32, O)
        mbarrier.wait(keys_in.index((step + 1) % STAGES), (step + 1) // STAGES % 2, pred=tiles > 1)
        for masked in gl.static_range(2):
            for tile in range(whole if masked == 1 else 1, tiles if masked == 1 else whole):
                previous = step % STAGES
                phase = step // STAGES % 2
                step += 1
                stage = step % STAGES
                if TURNS:
                    mbarrier.wait(turns[GROUP], turn)
                logits = _multiply(
                    my_queries, all_keys, my_rope_queries, rope_keys, stage, none, EXPANDED
                )
                mbarrier.wait(values_in.index(previous), phase)
                acc = warpgroup_mma(weights, all_values.index(previous), acc, is_async=True)
                if TURNS:
                    gl.thread_barrier()
                    mbarrier.arrive(turns[1 - GROUP])
                    turn ^= 1
                logits = warpgroup_mma_wait(1, deps=[logits])
                new_weights, top, total, kept = _soften(
                    logits, top, total, factor, own, tile * KEYS + key, masked == 1, dtype, OPERAND
                )
                # The compiler does not move this wait before the exponentials: it is a loop,
                # however short.
                mbarrier.wait(
                    keys_in.index((step + 1) % STAGES),
                    (step + 1) // STAGES % 2,
                    pred=tile + 1 < tiles,
                )
                acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
                gl.thread_barrier()
                mbarrier.arrive(keys_out.index(stage))
                mbarrier.arrive(values_out.index(previous))
                acc = (
                    acc
                    * gl.convert_layout(kept, gl.SliceLayout(1, O), assert_trivial=True)[:, None]
                )
                weights = new_weights
        mbarrier.arrive(queries_out)
        # The values of the last tile.
        stage = step % STAGES
        mbarrier.wait(values_in.index(stage), step // STAGES % 2)
        slot = gl.arange(0, PAGE, gl.SliceLayout(1, CLEANED))
        # In the last page, old numbers might be NaN. The other group may do the same meanwhile.
        for part in gl.static_range(V_PARTS):
            page = values.index((stage * V_PARTS + part) * PAGES + last // PAGE % PAGES)
            page.store(gl.where((slot <= last % PAGE)[:, None], page.load(CLEANED), 0.0))
        fence_async_shared()
        gl.thread_barrier()
        acc = warpgroup_mma(weights, all_values.index(stage), acc, is_async=True)
        acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
        gl.thread_barrier()
        mbarrier.arrive(values_out.index(stage))
        step += 1
        number += 1
        result = (
            acc
            * gl.convert_layout(v_scale / total, gl.SliceLayout(1, O), assert_trivial=True)[:, None]
        )
        result = gl.convert_layout(result.to(dtype), STORED)
        row = GROUP * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, STORED))
        offsets = row // TOGETHER * stride_out_token + (head * TOGETHER + row % TOGETHER) * DV
        d = gl.arange(0, DV, gl.SliceLayout(0, STORED))
        pointers = out + token.to(gl.int64) * stride_out_token + offsets[:, None] + d[None, :]
        gl.store(pointers, result, mask=(row // TOGETHER < left)[:, None])
        mbarrier.wait(queries_in, number % 2)
        left = _read(mail, 1)
