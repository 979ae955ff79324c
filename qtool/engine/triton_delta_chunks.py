"""Chunks of gated delta nets in Triton, `TOGETHER` tokens at a time.

The values that these tokens write depend on each other and on the state before them: u = (1 + L)^-1
rate (v - D k S), with the triangular L of `delta_rule`. The inverse does not need the state. So one
kernel computes it for all tokens in parallel, times what it is applied to; another goes from state
to state with four products for each step. Source: Yang et al. 2024, *Parallelizing Linear
Transformers with the Delta Rule over Sequence Length*, arXiv:2406.06484.
"""

# ruff: noqa: N803, N806 (constants of a Triton kernel are written in capitals)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtool.engine.attention.pages import Packed, RecurrentStates
from qtool.engine.attention.triton_paged import is_hopper
from qtool.engine.delta_rule import EPSILON, DeltaWeights
from qtool.engine.triton_delta_state import ANY_VALUE, begin, bounds, kept_channels, log_decay

TOGETHER = 64  # tokens of a step
BLOCK = tl.constexpr(16)  # of them, whose system is solved row by row
VALUES = 64  # of a head, in a program that goes from state to state
SOLVE_WARPS = 4
ADD_WARPS = 4
STAGES = 2  # of a program that goes from state to state, with numbers of 16 bits


def add_chunks(
    qkv: Tensor,
    mixed: Tensor,
    b: Tensor,
    a: Tensor,
    weights: DeltaWeights,
    states: RecurrentStates,
    packed: Packed,
    out: Tensor,
) -> None:
    """Fill ``out`` [T, heads, D] for the tokens of chunks, and update the states, see
    `delta_rule.mix`.

    Args:
        mixed: ``qkv`` after the convolution, [T, C].
    """
    assert packed.starts is not None
    shape = weights.shape
    tokens, heads = b.shape
    chunks = packed.starts.numel() - 1
    keys = mixed.new_empty(tokens, heads, shape.key_width)
    values = mixed.new_empty(tokens, heads, shape.value_width)
    seen = mixed.new_empty(tokens, heads, TOGETHER)
    scales = b.new_empty(tokens, heads, 3, dtype=torch.float32)
    is_wide = mixed.dtype == torch.float32
    shared = {
        "mixed": mixed,
        "keys": keys,
        "values": values,
        "seen": seen,
        "scales": scales,
        "starts": packed.starts,
        "decodes": packed.decodes,
        "C": mixed.shape[1],
        "SHARED": shape.shared,
        "KEYS": shape.key_heads * shape.key_width,
        "K": shape.key_width,
        "K_PADDED": max(16, triton.next_power_of_2(shape.key_width)),
        "V": shape.value_width,
        "TOGETHER": TOGETHER,
        # numbers of 16 bits have fewer digits than tf32
        "PRECISION": "tf32x3" if is_wide else "tf32",
    }
    _solve[(heads, triton.cdiv(packed.longest, TOGETHER), chunks)](
        b=b,
        a=a,
        stride_b=b.stride(0),
        stride_a=a.stride(0),
        decay=weights.decay,
        dt_bias=weights.dt_bias,
        V_PADDED=max(16, triton.next_power_of_2(shape.value_width)),
        EPSILON=EPSILON,
        **shared,
        num_warps=SOLVE_WARPS,
    )
    width = min(VALUES, max(16, triton.next_power_of_2(shape.value_width)))
    parts = triton.cdiv(shape.value_width, width)
    _add_chunks[(chunks, heads, parts)](
        x=qkv,
        conv=states.conv_state,
        matrix=states.recurrent_state,
        out=out,
        rows=packed.rows,
        positions=packed.positions,
        stride_x=qkv.stride(0),
        INPUTS=states.conv_state.shape[1],
        VALUES=width,
        STAGES=STAGES if is_hopper(mixed.device) and not is_wide else 1,
        **kept_channels(qkv, shape, parts),
        **shared,
        num_warps=ADD_WARPS,
    )


@triton.jit(**ANY_VALUE)
def _solve(  # type: ignore[no-untyped-def]
    mixed,
    b,
    a,
    decay,
    dt_bias,
    keys,
    values,
    seen,
    scales,
    starts,
    decodes,
    stride_b,
    stride_a,
    C: tl.constexpr,
    SHARED: tl.constexpr,
    KEYS: tl.constexpr,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    V: tl.constexpr,
    V_PADDED: tl.constexpr,
    TOGETHER: tl.constexpr,
    EPSILON: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write what a step of a head of a chunk needs, but for the state.

    ``values`` [T, heads, V] is what the tokens would write if the state were zeros, ``keys``
    [T, heads, K] what a state takes from that, ``seen`` [T, heads, TOGETHER] how much of what each
    token writes each query sees. ``scales`` [T, heads, 3] multiply queries that read the state,
    keys that write to it, and the state.
    """
    head = tl.program_id(0)
    heads = tl.num_programs(0)
    begin, end = bounds(starts, decodes + tl.program_id(2), decodes)
    begin += tl.program_id(1) * TOGETHER
    if begin >= end:
        return
    n = tl.arange(0, TOGETHER)
    i = tl.arange(0, K_PADDED)
    j = tl.arange(0, V_PADDED)
    exists = begin + n < end
    token = (begin + n).to(tl.int64)
    own = token * heads + head
    is_key, is_value = exists[:, None] & (i < K)[None, :], exists[:, None] & (j < V)[None, :]
    of_token = mixed + token[:, None] * C
    of_key = of_token + (head // SHARED * K + i)[None, :]
    rate = tl.load(b + token * stride_b + head, mask=exists, other=0.0).to(tl.float32)
    rate = tl.where(exists, tl.sigmoid(rate), 0.0)
    logs = log_decay(
        tl.load(a + token * stride_a + head, mask=exists, other=0.0), decay, dt_bias, head
    )
    logs = tl.where(exists, logs, 0.0)
    total = tl.cumsum(logs, 0)
    last = tl.sum(logs, 0)
    is_past = n[:, None] >= n[None, :]
    since = tl.exp(tl.where(is_past, total[:, None] - total[None, :], float("-inf")))

    k = tl.load(of_key + KEYS, mask=is_key, other=0.0)
    k_scale = _inverse_norm(k, EPSILON)
    q = tl.load(of_key, mask=is_key, other=0.0)
    q_scale = _inverse_norm(q, EPSILON) * K**-0.5
    alike = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    alike *= since * q_scale[:, None] * k_scale[None, :]
    tl.store(
        seen + own[:, None] * TOGETHER + n[None, :],
        alike.to(seen.dtype.element_ty),
        mask=exists[:, None],
    )
    of_scale = scales + own * 3
    tl.store(of_scale, q_scale * tl.exp(total), mask=exists)
    tl.store(of_scale + 1, k_scale * tl.exp(last - total), mask=exists)
    tl.store(of_scale + 2, tl.exp(last) + tl.zeros_like(total), mask=exists)

    system = tl.dot(k, tl.trans(k), input_precision=PRECISION)
    system *= since * (rate * k_scale)[:, None] * k_scale[None, :]
    system = tl.where(n[:, None] > n[None, :], system, 0.0)
    inverse = _inverse(system, TOGETHER, PRECISION)
    weight = (inverse * (rate * k_scale * tl.exp(total))[None, :]).to(k.dtype)
    result = tl.dot(weight, k, input_precision=PRECISION)
    pointers = keys + own[:, None] * K + i[None, :]
    tl.store(pointers, result.to(keys.dtype.element_ty), mask=is_key)
    v = tl.load(of_token + (2 * KEYS + head * V + j)[None, :], mask=is_value, other=0.0)
    weight = (inverse * rate[None, :]).to(v.dtype)
    result = tl.dot(weight, v, input_precision=PRECISION)
    pointers = values + own[:, None] * V + j[None, :]
    tl.store(pointers, result.to(values.dtype.element_ty), mask=is_value)


@triton.jit
def _inverse_norm(x, EPSILON: tl.constexpr):  # type: ignore[no-untyped-def]
    x = x.to(tl.float32)
    return tl.rsqrt(tl.sum(x * x, 1) + EPSILON)


@triton.jit
def _inverse(  # type: ignore[no-untyped-def]
    system, TOGETHER: tl.constexpr, PRECISION: tl.constexpr
):
    """Return the inverse of 1 + ``system``, of which only the part below the diagonal is not zero.

    Blocks on the diagonal are inverted row by row. With their inverses B and the rest R that is
    (1 + B R)^-1 B; powers of B R from the fourth on are zeros.
    """
    COUNT: tl.constexpr = TOGETHER // BLOCK
    n = tl.arange(0, TOGETHER)
    same_block = (n // BLOCK)[:, None] == (n // BLOCK)[None, :]
    inner = tl.where(same_block, system, 0.0)
    small = tl.sum(tl.reshape(inner, (COUNT, BLOCK, COUNT, BLOCK)), 2)
    row = tl.arange(0, BLOCK)[None, :, None]
    found = tl.where(row == tl.arange(0, BLOCK)[None, None, :], 1.0, 0.0)
    found += tl.zeros((COUNT, BLOCK, BLOCK), tl.float32)
    for index in range(1, BLOCK):
        factors = tl.sum(tl.where(row == index, small, 0.0), 1)
        taken = tl.sum(factors[:, :, None] * found, 1)
        found -= tl.where(row == index, taken[:, None, :], 0.0)
    blocks = found[:, :, None, :] + tl.zeros((COUNT, BLOCK, COUNT, BLOCK), tl.float32)
    blocks = tl.where(same_block, tl.reshape(blocks, (TOGETHER, TOGETHER)), 0.0)
    power = tl.dot(blocks, system - inner, input_precision=PRECISION)
    square = tl.dot(power, power, input_precision=PRECISION)
    rest = square - power - tl.dot(power, square, input_precision=PRECISION)
    return blocks + tl.dot(rest, blocks, input_precision=PRECISION)


@triton.jit(**ANY_VALUE)
def _add_chunks(  # type: ignore[no-untyped-def]
    x,
    mixed,
    keys,
    values,
    seen,
    scales,
    conv,
    matrix,
    out,
    starts,
    rows,
    positions,
    decodes,
    stride_x,
    C: tl.constexpr,
    INPUTS: tl.constexpr,
    KEPT: tl.constexpr,
    KEPT_PADDED: tl.constexpr,
    SHARED: tl.constexpr,
    KEYS: tl.constexpr,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    V: tl.constexpr,
    VALUES: tl.constexpr,
    TOGETHER: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Go through the steps of a chunk, which `_solve` has prepared, with some values of a head."""
    head, part = tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    first, end = bounds(starts, decodes + tl.program_id(0), decodes)
    if first == end:
        return
    i = tl.arange(0, K_PADDED)
    j = part * VALUES + tl.arange(0, VALUES)
    n = tl.arange(0, TOGETHER)
    row, position = tl.load(rows + first).to(tl.int64), tl.load(positions + first)
    matrices, inside, state = begin(
        x,
        conv,
        matrix,
        row,
        position,
        first,
        end,
        head,
        part,
        i,
        j,
        stride_x,
        C,
        INPUTS,
        KEPT,
        KEPT_PADDED,
        K,
        V,
    )
    for start in tl.range(first, end, TOGETHER, num_stages=STAGES):
        token = (start + n).to(tl.int64)
        exists = start + n < end
        own = token * heads + head
        is_key, is_value = exists[:, None] & (i < K)[None, :], exists[:, None] & (j < V)[None, :]
        of_key = mixed + token[:, None] * C + (head // SHARED * K + i)[None, :]
        taken = tl.load(keys + own[:, None] * K + i[None, :], mask=is_key, other=0.0)
        new = tl.load(values + own[:, None] * V + j[None, :], mask=is_value, other=0.0)
        q = tl.load(of_key, mask=is_key, other=0.0)
        k = tl.load(of_key + KEYS, mask=is_key, other=0.0)
        weight = tl.load(
            seen + own[:, None] * TOGETHER + n[None, :], mask=exists[:, None], other=0.0
        )
        q_scale = tl.load(scales + own * 3, mask=exists, other=0.0)
        k_scale = tl.load(scales + own * 3 + 1, mask=exists, other=0.0)
        kept = tl.load(scales + (start * heads + head) * 3 + 2)
        held = state.to(k.dtype)
        written = new.to(tl.float32) - tl.dot(taken, held, input_precision=PRECISION)
        result = tl.dot(q, held, input_precision=PRECISION) * q_scale[:, None]
        result = tl.dot(weight, written.to(k.dtype), result, input_precision=PRECISION)
        pointers = out + own[:, None] * V + j[None, :]
        tl.store(pointers, result.to(out.dtype.element_ty), mask=is_value)
        left = (written * k_scale[:, None]).to(k.dtype)
        state = tl.dot(tl.trans(k), left, state * kept, input_precision=PRECISION)
    tl.store(matrices, state, mask=inside)
