"""Decodes whose keys are cut into parts, in Triton: what each part leaves, and their sum."""

# ruff: noqa: N803, N806 (constants of a Triton kernel are written in capitals)
from __future__ import annotations

import triton
import triton.language as tl

# If at most this many parts are added at a time, they are stored number by number, which is faster
# from the layout of tensor cores; more are stored 16 bytes at a time, which are read faster.
FEW = tl.constexpr(16)


def power_of_two(count: int) -> int:
    """Return the largest power of two in ``count``, at least 1.

    Each number of parts is a kernel of its own. Only powers of two are used, which the CUDA graphs
    of powers of two sequences all need too, so that none compiles while a request waits.
    """
    return 1 << max(0, count.bit_length() - 1)


@triton.jit
def store_part(  # type: ignore[no-untyped-def]
    acc,
    total,
    top,
    out,
    partial,
    sums,
    arrived,
    group,
    part,
    parts,
    v_scale,
    SHARED: tl.constexpr,
    SHARED_PADDED: tl.constexpr,
    DV: tl.constexpr,
    PARTS: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """Write the result of the heads ``group`` of a decode, or keep this of its ``parts`` parts;
    the last to arrive adds them.

    Args:
        acc: sums of values, [ROWS, padded DV].
        total: sums of weights, [ROWS]; with ``acc`` and ``top`` from `triton_paged._attend_tiles`.
        top: the largest logit of each row, [ROWS].
        out: results, [groups, SHARED, DV].
        partial: ``acc`` of each part, [groups, PARTS, SHARED, DV].
        sums: ``total`` and ``top`` of each part, [2, groups, PARTS, SHARED].
        arrived: how many parts of each group are written, [groups]; zeros when all are added.
        group: a token's heads of queries that share keys.
        part: which of the parts this is.
        parts: into how many the keys of the token are cut.
        v_scale: what values were divided by.
    """
    DV_PADDED: tl.constexpr = acc.shape[1]
    row, dv = tl.arange(0, acc.shape[0]), tl.arange(0, DV_PADDED)
    inside = (row < SHARED)[:, None] & (dv < DV)[None, :]
    if parts == 1:
        result = (acc * (v_scale / total)[:, None]).to(out.dtype.element_ty)
        tl.store(out + (group * SHARED + row[:, None]) * DV + dv[None, :], result, mask=inside)
    elif PARTS > 1:
        mine = (group * PARTS + part) * SHARED + row
        groups = tl.num_programs(2).to(tl.int64) * tl.num_programs(0)
        tops = sums + groups * PARTS * SHARED
        pointers = partial + mine[:, None] * DV + dv[None, :]
        if TOGETHER > FEW and DV % 4 == 0:  # 16 bytes at a time
            pointers = tl.multiple_of(pointers, (16, 16))
        tl.store(pointers, acc, mask=inside)
        tl.store(sums + mine, total, mask=row < SHARED)
        tl.store(tops + mine, top, mask=row < SHARED)
        tl.debug_barrier()
        if tl.atomic_add(arrived + group, 1, sem="acq_rel") == parts - 1:
            tl.store(arrived + group, 0)
            add_parts(
                partial,
                sums,
                tops,
                out,
                group,
                parts,
                v_scale,
                dv,
                PARTS,
                SHARED,
                SHARED_PADDED,
                DV,
                TOGETHER,
            )


@triton.jit
def add_parts(  # type: ignore[no-untyped-def]
    partial,
    sums,
    tops,
    out,
    group,
    parts,
    v_scale,
    dv,
    most,
    SHARED: tl.constexpr,
    SHARED_PADDED: tl.constexpr,
    DV: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """Write the sum of the ``parts`` parts of the heads ``group`` to ``out``.

    Parts are always added in the same order, ``TOGETHER`` at a time.

    Args:
        dv: which numbers of the values.
        most: parts that there is memory for, of each group of heads.
    """
    member = tl.arange(0, SHARED_PADDED)
    acc = tl.zeros((SHARED_PADDED, dv.shape[0]), tl.float32)
    total = tl.zeros((SHARED_PADDED,), tl.float32)
    top = tl.where(member < SHARED, float("-inf"), 0.0)
    for begin in range(0, parts, TOGETHER):
        index = begin + tl.arange(0, TOGETHER)
        there = (group * most + index)[:, None] * SHARED + member[None, :]
        valid = (index < parts)[:, None] & (member < SHARED)[None, :]
        some_tops = tl.load(tops + there, mask=valid, other=float("-inf"), cache_modifier=".cg")
        some_sums = tl.load(sums + there, mask=valid, other=0.0, cache_modifier=".cg")
        inside = valid[:, :, None] & (dv < DV)[None, None, :]
        pointers = partial + there[:, :, None] * DV + dv[None, None, :]
        if TOGETHER > FEW and DV % 4 == 0:
            pointers = tl.multiple_of(pointers, (16, 16, 16))
        some = tl.load(pointers, mask=inside, other=0.0, cache_modifier=".cg")
        new_top = tl.maximum(top, tl.max(some_tops, 0))
        weight, kept = tl.exp2(some_tops - new_top[None, :]), tl.exp2(top - new_top)
        acc = acc * kept[:, None] + tl.sum(some * weight[:, :, None], 0)
        total = total * kept + tl.sum(some_sums * weight, 0)
        top = new_top
    result = (acc * (v_scale / total)[:, None]).to(out.dtype.element_ty)
    tl.store(
        out + (group * SHARED + member[:, None]) * DV + dv[None, :],
        result,
        mask=(member < SHARED)[:, None] & (dv < DV)[None, :],
    )
