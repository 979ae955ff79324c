"""Decode attention over FP8 pages in Gluon: each warp reads keys and values straight into the
registers that tensor cores multiply.

Numbers become f16 where they arrive, with no pass through shared memory and no barrier. Keys are
the rows of one product and values those of the other, and the queries that share a KV head are the
eight columns. Warps take parts of a sequence; a second kernel adds these.
"""

# Constants of a kernel are written in capitals.
# ruff: noqa: N803, N806
from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qtool.engine.attention.pages import PAGE, KVPages, Packed
from qtool.engine.attention.triton_parts import power_of_two
from qtool.runtime.triton.tiles import multiprocessors, start_early

HEAD_DIM = gl.constexpr(128)
WORDS = gl.constexpr(32)  # int32 of a key or value, four numbers each
COLUMNS = gl.constexpr(8)  # heads of queries that share a KV head, at most
KEYS = 2 * PAGE  # of a step
MIN_STEPS = 4  # of a part
WARPS = 8  # of all sequences, KV heads and parts, for each multiprocessor, about
# Channels of the values that a program adds parts of, or fewer if there are many parts.
CHANNELS = 128
# With at most this many sequences times KV heads, more programs take fewer channels each.
FEW_PROGRAMS = 128
FEW_CHANNELS = 32
SUM_WARPS = 4
NUMBERS = 64 * 32 * SUM_WARPS  # that a program adds, at most: 64 of a thread


def applies(
    q: Tensor, kv: KVPages, window: int | None, softcap: float | None, sinks: Tensor | None
) -> bool:
    """Whether `decode` supports this attention."""
    return (
        kv.k.dtype == kv.v.dtype == torch.float8_e4m3fn
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[2] == kv.v.shape[3] == HEAD_DIM
        and q.shape[1] // kv.k.shape[1] <= COLUMNS
        and kv.k.is_contiguous()
        and kv.v.is_contiguous()
        and window is None
        and not softcap
        and sinks is None
    )


def decode(
    q: Tensor,
    kv: KVPages,
    packed: Packed,
    out: Tensor,
    *,
    factor: float,
    v_scale: float,
    launch: Mapping[str, int | bool],
) -> None:
    """Fill ``out`` for the decodes, if this `applies`. See `triton_paged.decode`.

    Args:
        q: queries of all tokens, [T, heads, 128], bf16 or f16, contiguous in their last dimension.
        kv: the pages of the layer, float8_e4m3fn.
        packed: the tokens of the pass.
        out: [T, heads, 128], contiguous; its first ``packed.decodes`` rows are written.
        factor: what logits are multiplied with, in units of log2.
        v_scale: what results are multiplied with.
        launch: from `triton_paged.launch_options`.
    """
    tokens = packed.decodes
    kv_heads = kv.k.shape[1]
    shared = q.shape[1] // kv_heads
    parts = max_parts(tokens * kv_heads, q.device)
    partial = q.new_empty((tokens, kv_heads, parts, shared, HEAD_DIM.value), dtype=torch.float32)
    sums = q.new_empty((2, tokens, kv_heads, parts, shared), dtype=torch.float32)
    k, v = kv.k.view(torch.int32), kv.v.view(torch.int32)
    _attend_parts[(kv_heads, parts, tokens)](
        q=q,
        k_pages=k,
        v_pages=v,
        table=packed.table,
        rows=packed.rows,
        positions=packed.positions,
        partial=partial,
        sums=sums,
        stride_table_row=packed.table.shape[1],
        stride_q_token=q.stride(0),
        stride_q_head=q.stride(1),
        stride_page=k.stride(0),
        stride_page_head=k.stride(1),
        factor=factor,
        least=MIN_STEPS,
        SHARED=shared,
        KEYS=KEYS,
        PAGE=PAGE,
        **launch,
    )
    padded = triton.next_power_of_2(shared)
    together, channels = sum_tile(tokens, kv_heads, padded, q.device)
    _sum_parts[(kv_heads, tokens, HEAD_DIM.value // channels)](
        partial=partial,
        sums=sums,
        positions=packed.positions,
        out=out,
        parts=parts,
        least=MIN_STEPS,
        v_scale=v_scale,
        SHARED=shared,
        SHARED_PADDED=padded,
        DV=HEAD_DIM.value,
        KEYS=KEYS,
        TOGETHER=together,
        WIDTH=channels,
        **{**launch, "num_warps": SUM_WARPS},
    )


def max_parts(groups: int, device: torch.device) -> int:
    """Return how many parts a sequence may be cut into, for ``groups`` sequences times KV heads."""
    count = multiprocessors(device)
    return max(1, min(count, WARPS * count // groups))


def sum_tile(
    tokens: int, kv_heads: int, shared_padded: int, device: torch.device
) -> tuple[int, int]:
    """Return how many parts and channels a program of `_sum_parts` takes.

    Each choice is a kernel of its own, so it is the same for all ``tokens`` from one power of two
    to the next, see `triton_parts.power_of_two`.

    Args:
        tokens: that decode, one of each sequence.
        kv_heads: of the layer.
        shared_padded: heads of queries that share a KV head, rounded up to a power of two.
        device: that decodes.
    """
    groups = power_of_two(tokens) * kv_heads
    # at least what the largest graph uses, so that more tokens do not need another kernel
    together = max(2, triton.next_power_of_2(max_parts(groups, device)))
    channels = FEW_CHANNELS if groups <= FEW_PROGRAMS else CHANNELS
    return together, min(channels, NUMBERS // (together * shared_padded))


@gluon.jit(
    do_not_specialize=["stride_table_row", "least"],
    do_not_specialize_on_alignment=["table", "rows", "positions", "sums"],
)
def _attend_parts(  # type: ignore[no-untyped-def]
    q,
    k_pages,
    v_pages,
    table,
    rows,
    positions,
    partial,
    sums,
    stride_table_row,
    stride_q_token,
    stride_q_head,
    stride_page,
    stride_page_head,
    factor,
    least,
    SHARED: gl.constexpr,
    KEYS: gl.constexpr,
    PAGE: gl.constexpr,
    PDL: gl.constexpr,
):
    """Keep sums, in ``partial`` and ``sums``, over one part of the keys of a sequence."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
    K: gl.constexpr = gl.DotOperandLayout(0, MMA, 8)
    V: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    WRITE: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [1, 1], [1, 0])
    Q_READ: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [1, 1], [1, 0])
    # a thread reads 16 bytes at a time; its numbers are then renumbered as the product wants them
    K_READ: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [8, 0], [0, 16], [16, 0]],
        [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
        [],
        [],
        [KEYS, WORDS],
    )
    V_READ: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [1, 0], [8, 0], [16, 0]],
        [[2, 0], [4, 0], [0, 4], [0, 8], [0, 16]],
        [],
        [],
        [KEYS, WORDS],
    )
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    head, part, token = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    last = gl.load(positions + token)
    pages = table + gl.load(rows + token) * stride_table_row
    steps = last // KEYS + 1
    count = gl.maximum(gl.minimum(gl.num_programs(1), steps // least), 1)
    if part >= count:
        return
    begin = part * steps // count
    end = (part + 1) * steps // count

    column = gl.arange(0, COLUMNS, gl.SliceLayout(1, Q_READ))
    d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, Q_READ))
    d = d // 64 * 64 + d // 8 % 4 * 16 + d // 32 % 2 * 8 + d % 8  # in the order of `keys`
    start = q + token.to(gl.int64) * stride_q_token + head * SHARED * stride_q_head
    x = gl.load(
        start + column[:, None] * stride_q_head + d[None, :],
        mask=(column < SHARED)[:, None],
        other=0.0,
    ).to(gl.float32)
    largest = gl.max(gl.abs(x), 1)
    largest = gl.where(largest > 1e-30, largest, 1.0)  # f16 has no number above 65504
    queries = (x / largest[:, None]).to(gl.float16).permute(1, 0)
    queries = gl.convert_layout(queries, gl.DotOperandLayout(1, MMA, 8))
    factor = factor * gl.convert_layout(largest, gl.SliceLayout(0, MMA))

    k_key = gl.arange(0, KEYS, gl.SliceLayout(1, K_READ))
    v_key = gl.arange(0, KEYS, gl.SliceLayout(1, V_READ))
    word = gl.arange(0, WORDS, gl.SliceLayout(0, K_READ))[None, :]
    k_pointers = k_pages + head * stride_page_head + k_key[:, None] % PAGE * WORDS + word
    word = gl.arange(0, WORDS, gl.SliceLayout(0, V_READ))[None, :]
    v_pointers = v_pages + head * stride_page_head + v_key[:, None] % PAGE * WORDS + word
    key = gl.arange(0, KEYS, gl.SliceLayout(1, MMA))

    total = gl.full([COLUMNS], 0.0, gl.float32, gl.SliceLayout(0, MMA))
    top = gl.full([COLUMNS], float("-inf"), gl.float32, gl.SliceLayout(0, MMA))
    acc = gl.zeros([HEAD_DIM, COLUMNS], gl.float32, MMA)
    # a step computes with what the step before it has read, from pages found in the one before that
    found = _find(pages, begin, end, last, stride_page, PAGE)
    next_k = _read(k_pointers, k_key, found, begin, end, last, KEYS, PAGE)
    next_v = _read(v_pointers, v_key, found, begin, end, last, KEYS, PAGE)
    found = _find(pages, begin + 1, end, last, stride_page, PAGE)
    for step in range(begin, end):
        k, v = _f16(next_k), _f16_by_pairs(next_v)
        next_k = _read(k_pointers, k_key, found, step + 1, end, last, KEYS, PAGE)
        next_v = _read(v_pointers, v_key, found, step + 1, end, last, KEYS, PAGE)
        found = _find(pages, step + 2, end, last, stride_page, PAGE)
        k = k.reshape([KEYS, 2, 4, 2, 8]).permute(0, 1, 3, 2, 4).reshape([KEYS, HEAD_DIM])
        k = gl.convert_layout(k, K, assert_trivial=True)
        logits = mma_v2(k, queries, gl.zeros([KEYS, COLUMNS], gl.float32, MMA)) * factor[None, :]
        logits = gl.where((step * KEYS + key <= last)[:, None], logits, float("-inf"))
        new_top = gl.maximum(top, gl.max(logits, 0))
        p = gl.exp2(logits - new_top[None, :])
        kept = gl.exp2(top - new_top)
        total = total * kept + gl.sum(p, 0)
        # rows of the product: value dv is row dv % 16 * 8 + dv // 16
        v = v.reshape([KEYS // 2, 8, 4, 2, 2, 2]).permute(2, 3, 4, 1, 0, 5)
        v = gl.convert_layout(v.reshape([HEAD_DIM, KEYS]), V, assert_trivial=True)
        weights = gl.convert_layout(p.to(gl.float16), gl.DotOperandLayout(1, MMA, 2))
        acc = mma_v2(v, weights, acc * kept[None, :])
        top = new_top

    group = token.to(gl.int64) * gl.num_programs(0) + head
    mine = (group * gl.num_programs(1) + part) * SHARED
    # Value dv is in row dv % 16 * 8 + dv // 16. In order, a thread stores 16 bytes at a time, and
    # a warp whole lines.
    acc = acc.reshape([16, 8, COLUMNS]).permute(2, 1, 0).reshape([COLUMNS, HEAD_DIM])
    column = gl.arange(0, COLUMNS, gl.SliceLayout(1, WRITE))[:, None]
    dv = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, WRITE))[None, :]
    there = partial + (mine + column) * HEAD_DIM + dv
    gl.store(there, gl.convert_layout(acc, WRITE), mask=column < SHARED)
    column = gl.arange(0, COLUMNS, gl.SliceLayout(0, MMA))
    gl.store(sums + mine + column, total, mask=column < SHARED)
    all_parts = gl.num_programs(2).to(gl.int64) * gl.num_programs(0) * gl.num_programs(1)
    gl.store(sums + all_parts * SHARED + mine + column, top, mask=column < SHARED)


@gluon.jit
def _find(  # type: ignore[no-untyped-def]
    pages, step, end, last, stride_page, PAGE: gl.constexpr
):
    """Return where the two pages of ``step`` begin."""
    index = step * 2
    first = gl.load(pages + index, mask=step < end, other=0)
    there = (step < end) & ((index + 1) * PAGE <= last)
    second = gl.load(pages + index + 1, mask=there, other=0)
    return first.to(gl.int64) * stride_page, second.to(gl.int64) * stride_page


@gluon.jit
def _read(  # type: ignore[no-untyped-def]
    pointers, key, found, step, end, last, KEYS: gl.constexpr, PAGE: gl.constexpr
):
    """Return the keys or values of ``step``, int32 [KEYS, WORDS]; zeros where there is none."""
    begins = gl.where(key < PAGE, found[0], found[1])[:, None]
    visible = (key <= last - step * KEYS) & (step < end)
    return gl.load(pointers + begins, mask=visible[:, None], other=0)


@gluon.jit
def _f16(x):  # type: ignore[no-untyped-def]
    """Return the four FP8 numbers of each int32 of ``x`` [N, C] in f16, [N, 4 * C]."""
    a, b, c, d = gl.inline_asm_elementwise(
        """{.reg .b16 x, y; .reg .b32 low, high;
        mov.b32 {x, y}, $4;
        cvt.rn.f16x2.e4m3x2 low, x; cvt.rn.f16x2.e4m3x2 high, y;
        mov.b32 {$0, $1}, low; mov.b32 {$2, $3}, high;}""",
        "=h,=h,=h,=h,r",
        [x],
        dtype=(gl.float16, gl.float16, gl.float16, gl.float16),
        is_pure=True,
        pack=1,
    )
    # by the half of the int32, then the position in it
    numbers = gl.join(gl.join(a, c), gl.join(b, d))
    return numbers.reshape([x.shape[0], 4 * x.shape[1]])


@gluon.jit
def _f16_by_pairs(x):  # type: ignore[no-untyped-def]
    """Return the four FP8 numbers of each int32 of ``x`` [N, C] in f16, those of two rows beside
    each other: [N / 2, C, 2, 2, 2], by the half of the int32, the position in it, and the row.
    """
    even, odd = gl.split(x.reshape([x.shape[0] // 2, 2, x.shape[1]]).permute(0, 2, 1))
    a, b, c, d, e, f, g, h = gl.inline_asm_elementwise(
        """{.reg .b16 x, y; .reg .b32 bytes, low, high;
        prmt.b32 bytes, $8, $9, 0x5140;
        mov.b32 {x, y}, bytes;
        cvt.rn.f16x2.e4m3x2 low, x; cvt.rn.f16x2.e4m3x2 high, y;
        mov.b32 {$0, $1}, low; mov.b32 {$2, $3}, high;
        prmt.b32 bytes, $8, $9, 0x7362;
        mov.b32 {x, y}, bytes;
        cvt.rn.f16x2.e4m3x2 low, x; cvt.rn.f16x2.e4m3x2 high, y;
        mov.b32 {$4, $5}, low; mov.b32 {$6, $7}, high;}""",
        "=h,=h,=h,=h,=h,=h,=h,=h,r,r",
        [even, odd],
        dtype=(gl.float16,) * 8,
        is_pure=True,
        pack=1,
    )
    low = gl.join(gl.join(a, c), gl.join(b, d))  # join adds the last dimension
    high = gl.join(gl.join(e, g), gl.join(f, h))
    return gl.join(low, high).permute(0, 1, 4, 2, 3)


@triton.jit(
    do_not_specialize=["parts", "least"],
    do_not_specialize_on_alignment=["positions", "sums"],
)
def _sum_parts(  # type: ignore[no-untyped-def]
    partial,
    sums,
    positions,
    out,
    parts,
    least,
    v_scale,
    SHARED: tl.constexpr,
    SHARED_PADDED: tl.constexpr,
    DV: tl.constexpr,
    KEYS: tl.constexpr,
    TOGETHER: tl.constexpr,
    WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):
    """Add ``WIDTH`` channels of the values of a sequence's parts, all at once: there are at most
    ``TOGETHER``.
    """
    start_early(PDL)
    head, token = tl.program_id(0), tl.program_id(1)
    steps = tl.load(positions + token) // KEYS + 1
    count = tl.maximum(tl.minimum(parts, steps // least), 1)
    group = token.to(tl.int64) * tl.num_programs(0) + head
    tops = sums + tl.num_programs(1).to(tl.int64) * tl.num_programs(0) * parts * SHARED
    index, member = tl.arange(0, TOGETHER), tl.arange(0, SHARED_PADDED)
    dv = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    there = (group * parts + index)[:, None] * SHARED + member[None, :]
    exists = (index < count)[:, None] & (member < SHARED)[None, :]
    top = tl.load(tops + there, mask=exists, other=float("-inf"), cache_modifier=".cg")
    total = tl.load(sums + there, mask=exists, other=0.0, cache_modifier=".cg")
    acc = tl.load(
        partial + there[:, :, None] * DV + dv[None, None, :],
        mask=exists[:, :, None],
        other=0.0,
        cache_modifier=".cg",
    )
    largest = tl.where(member < SHARED, tl.max(top, 0), 0.0)
    weight = tl.exp2(top - largest[None, :])
    total = tl.sum(total * weight, 0)
    acc = tl.sum(acc * weight[:, :, None], 0)
    result = (acc * (v_scale / total)[:, None]).to(out.dtype.element_ty)
    tl.store(
        out + (group * SHARED + member[:, None]) * DV + dv[None, :],
        result,
        mask=(member < SHARED)[:, None],
    )
