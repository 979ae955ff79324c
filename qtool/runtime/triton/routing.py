"""The choices of routers on a GPU: sorted by expert for a product, and summed up after it."""

# ruff: noqa: N803, N806 (constants of a Triton kernel are written in capitals)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtool.runtime.experts.routing import Blocks, SharedExpert, most_blocks
from qtool.runtime.experts.rules import RoutingRule
from qtool.runtime.triton.tiles import start_early

# Choices that one launch sorts, each program looking at all of them; a kernel for each size.
ONE_LAUNCH = (32, 512, 4096)
# More choices are cut into segments, one for each program. Their number is fixed: a kernel for
# another number would compile while requests wait.
SEGMENTS = 128
CHUNK = 256  # choices of a segment that its program looks at together
COUNTS = 16384  # counts that a program adds up together, at most
SORT_WARPS = 8
TILE = 1024  # outputs of a program that adds up


def top_experts(
    logits: Tensor, rule: RoutingRule, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return what `route` does, weights of ``dtype`` and experts int64 [T, top_k], in one launch.

    Args:
        logits: [T, experts], contiguous.
        rule: how to choose; where it has groups, their number and size are powers of two.
        bias: f32 [experts], or None.
        dtype: of the weights.
    """
    tokens, count = logits.shape
    weights = logits.new_empty(tokens, rule.top_k, dtype=dtype)
    experts = logits.new_empty(tokens, rule.top_k, dtype=torch.int64)
    padded = triton.next_power_of_2(count)
    _top_experts[(tokens,)](
        logits=logits,
        bias=bias,
        weights=weights,
        experts=experts,
        N=count,
        PADDED=padded,
        GROUPS=rule.groups,
        TOP_GROUPS=rule.top_groups,
        TOP_K=rule.top_k,
        TOP_PADDED=triton.next_power_of_2(rule.top_k),
        SIGMOID=rule.scores == "sigmoid",
        OF_CHOSEN=rule.of_chosen,
        NORMALIZES=rule.normalizes,
        SCALING=rule.scaling,
        num_warps=1 if padded <= 256 else 2,
    )
    return weights, experts


def sort_choices(experts: Tensor, count: int, size: int, *, pdl: bool = False) -> Blocks:
    """Return what `sort_by_expert` does, in one launch, or in two for many choices.

    Args:
        experts: the experts of each token, int32 or int64 [T, top_k], contiguous.
        count: of all experts.
        size: rows of a block.
        pdl: whether to start while the kernel before ends; see `start_early`.
    """
    choices = experts.numel()
    blocks = most_blocks(choices, count, size)
    # each begins at whole 16 bytes: Triton would compile kernels again for one that does not
    end = 4 + blocks * size
    numbers = torch.empty(end + blocks, dtype=torch.int32, device=experts.device)
    used, rows, of_block = numbers[:1], numbers[4:end], numbers[end:]
    result = Blocks(rows, of_block, used, size, choices, experts.shape[1])
    if choices > ONE_LAUNCH[-1]:
        _sort_many(experts, count, result, pdl=pdl)
        return result
    chunk = next(size for size in ONE_LAUNCH if choices <= size)
    _sort[(count,)](
        experts=experts,
        rows=rows,
        of_block=of_block,
        used=used,
        choices=choices,
        COUNT=triton.next_power_of_2(count),
        SIZE=size,
        CHUNK=chunk,
        PDL=pdl,
        num_warps=max(1, min(8, chunk // 256)),
        **({"launch_pdl": True} if pdl else {}),
    )
    return result


def _sort_many(experts: Tensor, count: int, blocks: Blocks, *, pdl: bool) -> None:
    """Fill ``blocks`` in two launches: the first counts the choices of each segment by expert, the
    second writes them to their rows.
    """
    bins = triton.next_power_of_2(count)
    counts = torch.empty(SEGMENTS, bins, dtype=torch.int32, device=experts.device)
    options = {"num_warps": SORT_WARPS, **({"launch_pdl": True} if pdl else {})}
    _count_segment[(SEGMENTS,)](
        experts=experts,
        counts=counts,
        choices=blocks.choices,
        COUNT=bins,
        CHUNK=CHUNK,
        PDL=pdl,
        **options,
    )
    _sort_segment[(SEGMENTS,)](
        experts=experts,
        counts=counts,
        rows=blocks.rows,
        of_block=blocks.experts,
        used=blocks.used,
        choices=blocks.choices,
        count=count,
        size=blocks.size,
        COUNT=bins,
        SEGMENTS=SEGMENTS,
        TOGETHER=max(1, min(SEGMENTS, COUNTS // bins)),
        CHUNK=CHUNK,
        PDL=pdl,
        **options,
    )


def add_up(
    y: Tensor, weights: Tensor, shared: SharedExpert | None = None, *, pdl: bool = False
) -> Tensor:
    """Return for each token the sum of the outputs of its experts, [T, N], times their weights.

    Args:
        y: the outputs, [T * top_k, N], contiguous.
        weights: of the experts of each token, [T, top_k], contiguous.
        shared: the results of a shared expert, added as `add_shared` does; None without one.
        pdl: whether to start while the kernel before ends.
    """
    (tokens, top_k), width = weights.shape, y.shape[1]
    out = y.new_empty(tokens, width)
    _add_up[(tokens, triton.cdiv(width, TILE))](
        y=y,
        weights=weights,
        shared=shared.y.contiguous() if shared else None,
        gate=shared.gate.contiguous() if shared else None,
        out=out,
        N=width,
        TOP_K=top_k,
        TILE=TILE,
        PDL=pdl,
        num_warps=4,
        **({"launch_pdl": True} if pdl else {}),
    )
    return out


@triton.jit
def _top_experts(  # type: ignore[no-untyped-def]
    logits,
    bias,
    weights,
    experts,
    N,
    PADDED: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_PADDED: tl.constexpr,
    SIGMOID: tl.constexpr,
    OF_CHOSEN: tl.constexpr,
    NORMALIZES: tl.constexpr,
    SCALING: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, PADDED)
    j = tl.arange(0, TOP_PADDED)
    logit = tl.load(logits + token * N + e, mask=e < N, other=float("-inf")).to(tl.float32)
    if SIGMOID:
        score = tl.sigmoid(logit)
    else:
        # of the chosen alone, all are divided by their sum in the end
        score = tl.exp(logit - tl.max(logit, 0))
        if not OF_CHOSEN:
            score = tl.div_rn(score, tl.zeros_like(score) + tl.sum(score, 0))
    choice = logit if OF_CHOSEN else score
    if bias is not None:
        choice += tl.load(bias + e, mask=e < N, other=0.0)
    choice = tl.where(e < N, choice, float("-inf"))
    if GROUPS > 1:
        choice = _in_best_groups(choice, GROUPS, TOP_GROUPS, PADDED)
    chosen = tl.zeros((TOP_PADDED,), tl.int32)
    weight = tl.zeros((TOP_PADDED,), tl.float32)
    for i in tl.static_range(TOP_K):
        best = tl.minimum(tl.argmax(choice, 0), N - 1)  # which is anything where all are NaN
        chosen = tl.where(j == i, best, chosen)
        weight = tl.where(j == i, tl.sum(tl.where(e == best, score, 0.0), 0), weight)
        choice = tl.where(e == best, float("-inf"), choice)
    if NORMALIZES or OF_CHOSEN:
        weight = tl.div_rn(weight, tl.zeros_like(weight) + tl.sum(weight, 0) + 1e-20)
    weight *= SCALING
    index = token * TOP_K + j
    tl.store(weights + index, weight.to(weights.dtype.element_ty), mask=j < TOP_K)
    tl.store(experts + index, chosen.to(tl.int64), mask=j < TOP_K)


@triton.jit
def _in_best_groups(  # type: ignore[no-untyped-def]
    choice, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, PADDED: tl.constexpr
):
    """Return ``choice`` [PADDED], minus infinity outside the best groups."""
    SIZE: tl.constexpr = PADDED // GROUPS
    groups = tl.reshape(choice, (GROUPS, SIZE))
    i = tl.arange(0, SIZE)[None, :]
    g = tl.arange(0, GROUPS)
    first = tl.max(groups, 1)
    at = tl.argmax(groups, 1)
    total = first + tl.max(tl.where(i == at[:, None], float("-inf"), groups), 1)
    is_best = tl.zeros((GROUPS,), tl.int32)
    for _ in tl.static_range(TOP_GROUPS):
        best = tl.argmax(total, 0)
        is_best = tl.where(g == best, 1, is_best)
        total = tl.where(g == best, float("-inf"), total)
    return tl.reshape(tl.where(is_best[:, None] == 1, groups, float("-inf")), (PADDED,))


@triton.jit(do_not_specialize=["choices"])
def _sort(  # type: ignore[no-untyped-def]
    experts,
    rows,
    of_block,
    used,
    choices,
    COUNT: tl.constexpr,
    SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Write the blocks of one expert; each program counts all choices for itself."""
    expert = tl.program_id(0)
    e = tl.arange(0, COUNT)
    i = tl.arange(0, CHUNK)
    start_early(PDL)
    is_there = i < choices
    chosen = tl.load(experts + i, mask=is_there, other=0).to(tl.int32)
    counts = tl.histogram(chosen, COUNT, is_there)
    padded = (counts + SIZE - 1) // SIZE * SIZE
    first = tl.sum(tl.where(e < expert, padded, 0), 0)
    own = tl.sum(tl.where(e == expert, counts, 0), 0)
    mine = ((chosen == expert) & is_there).to(tl.int32)
    tl.store(rows + first + tl.cumsum(mine, 0) - 1, i, mask=mine != 0)
    end = first + (own + SIZE - 1) // SIZE * SIZE
    missing = first + own + tl.arange(0, SIZE)
    tl.store(rows + missing, choices + tl.zeros_like(missing), mask=missing < end)
    for block in range(first // SIZE, end // SIZE):
        tl.store(of_block + block, expert)
    if expert == 0:
        tl.store(used, tl.sum(padded, 0))


@triton.jit(do_not_specialize=["choices"])
def _count_segment(  # type: ignore[no-untyped-def]
    experts, counts, choices, COUNT: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr
):
    """Write how many choices of a segment each expert has, to ``counts`` [segments, COUNT]."""
    segment = tl.program_id(0)
    i = tl.arange(0, CHUNK)
    start_early(PDL)
    own = tl.zeros((COUNT,), tl.int32)
    begin, end = _segment(segment, choices, tl.num_programs(0), CHUNK)
    for start in range(begin, end, CHUNK):
        is_there = start + i < end
        chosen = tl.load(experts + start + i, mask=is_there, other=0).to(tl.int32)
        own += tl.histogram(chosen, COUNT, is_there)
    tl.store(counts + segment * COUNT + tl.arange(0, COUNT), own)


# the size of blocks is an argument: as a constant, each size would compile while requests wait
@triton.jit(do_not_specialize=["choices", "count", "size"])
def _sort_segment(  # type: ignore[no-untyped-def]
    experts,
    counts,
    rows,
    of_block,
    used,
    choices,
    count,
    size,
    COUNT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    TOGETHER: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Write the choices of a segment to their rows. For its share of the experts, each program also
    fills the rows of blocks that have no choice, and writes the expert of each block.
    """
    segment = tl.program_id(0)
    e = tl.arange(0, COUNT)
    i = tl.arange(0, CHUNK)
    s = tl.arange(0, TOGETHER)
    start_early(PDL)
    all_parts = tl.zeros((TOGETHER, COUNT), tl.int32)
    parts_before = tl.zeros((TOGETHER, COUNT), tl.int32)
    for above in range(0, SEGMENTS, TOGETHER):
        part = tl.load(counts + (above + s)[:, None] * COUNT + e[None, :])
        all_parts += part
        parts_before += tl.where((above + s < segment)[:, None], part, 0)
    owns = tl.sum(all_parts, 0)
    padded = (owns + size - 1) // size * size
    firsts = tl.cumsum(padded, 0) - padded
    next_rows = firsts + tl.sum(parts_before, 0)
    begin, end = _segment(segment, choices, SEGMENTS, CHUNK)
    for start in range(begin, end, CHUNK):
        is_there = start + i < end
        chosen = tl.load(experts + start + i, mask=is_there, other=0).to(tl.int32)
        is_earlier = (i[:, None] < i[None, :]) & (chosen[:, None] == chosen[None, :])
        row = tl.gather(next_rows, chosen, 0) + tl.sum(is_earlier.to(tl.int32), 0)
        tl.store(rows + row, start + i, mask=is_there)
        next_rows += tl.histogram(chosen, COUNT, is_there)
    for expert in range(segment, count, SEGMENTS):
        first = tl.sum(tl.where(e == expert, firsts, 0), 0)
        own = tl.sum(tl.where(e == expert, owns, 0), 0)
        last = first + (own + size - 1) // size * size
        for gap in range(first + own, last, 32):
            missing = gap + tl.arange(0, 32)
            tl.store(rows + missing, choices + tl.zeros_like(missing), mask=missing < last)
        for block in range(first // size, last // size):
            tl.store(of_block + block, expert)
    if segment == 0:
        tl.store(used, tl.sum(padded, 0))


@triton.jit
def _segment(segment, choices, segments, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return where the choices of ``segment`` begin and end. Segments have the same number of whole
    chunks, but the last ones may be shorter or empty.
    """
    length = tl.cdiv(tl.cdiv(choices, segments), CHUNK) * CHUNK
    begin = segment * length
    return begin, tl.minimum(begin + length, choices)


@triton.jit
def _add_up(  # type: ignore[no-untyped-def]
    y,
    weights,
    shared,
    gate,
    out,
    N,
    TOP_K: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * TILE + tl.arange(0, TILE)
    start_early(PDL)
    total = tl.zeros((TILE,), tl.float32)
    for choice in tl.static_range(TOP_K):
        weight = tl.load(weights + token * TOP_K + choice).to(tl.float32)
        part = tl.load(y + (token * TOP_K + choice) * N + n, mask=n < N, other=0.0)
        total += weight * part.to(tl.float32)
    if shared is not None:
        weight = tl.sigmoid(tl.load(gate + token).to(tl.float32))
        total += weight * tl.load(shared + token * N + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out + token * N + n, total.to(out.dtype.element_ty), mask=n < N)


# kernels whose outputs choose what torch reads, and so must never be arbitrary
WRITES_INDICES = frozenset({_top_experts})
