"""Chunks of gated delta nets in Triton, `TOGETHER` tokens at a time.

The values that these tokens write depend on each other and on the state before them: u = (1 + L)^-1
rate (v - D k S), with the triangular L of `delta_rule`. The inverse and the attention of queries to
u do not need the state: two kernels compute these for all tokens in parallel, then a third goes
from state to state. Source: Yang et al. 2024, *Parallelizing Linear Transformers with the Delta
Rule over Sequence Length*, arXiv:2406.06484.
"""

# ruff: noqa: N803 (constants of a Triton kernel are written in capitals)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtool.engine.attention.pages import Packed, RecurrentStates
from qtool.engine.attention.triton_paged import is_hopper
from qtool.engine.delta_rule import EPSILON, DeltaWeights
from qtool.engine.triton_delta_state import ANY_VALUE, bounds, kept_channels, load_state, log_decay

TOGETHER = 64  # tokens of a step
VALUES = 64  # of a head, in a program that goes from state to state
WARPS = 4
STAGES = 2  # of a program that goes from state to state, where shared memory holds them


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
    inverses = mixed.new_empty(tokens, heads, 2, TOGETHER)
    # f32: what nearly equal keys write cancels out, and leaves the rounding errors
    attention = mixed.new_empty(tokens, heads, TOGETHER, dtype=torch.float32)
    scales = mixed.new_empty(tokens, heads, 3, dtype=torch.float32)
    key_padded = max(16, triton.next_power_of_2(shape.key_width))
    row_bytes = key_padded * mixed.itemsize
    shared = {
        "mixed": mixed,
        "starts": packed.starts,
        "decodes": packed.decodes,
        "C": mixed.shape[1],
        "SHARED": shape.shared,
        "KEYS": shape.key_heads * shape.key_width,
        "K": shape.key_width,
        "K_PADDED": key_padded,
        "TOGETHER": TOGETHER,
        # numbers of 16 bits have fewer digits than tf32
        "PRECISION": "tf32x3" if mixed.dtype == torch.float32 else "tf32",
        "num_warps": WARPS,
    }
    steps = heads, triton.cdiv(packed.longest, TOGETHER), chunks
    decays = {
        "a": a,
        "stride_a": a.stride(0),
        "decay": weights.decay,
        "dt_bias": weights.dt_bias,
        "EPSILON": EPSILON,
    }
    solved = {"keys": keys, "inverses": inverses}
    attended = {"attention": attention, "scales": scales}
    _solve[steps](b=b, stride_b=b.stride(0), **decays, **solved, **shared)
    _attend[steps](**decays, **attended, **shared)
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
        V=shape.value_width,
        INPUTS=states.conv_state.shape[1],
        VALUES=width,
        STAGES=STAGES if is_hopper(mixed.device) and row_bytes <= 256 else 1,
        **kept_channels(qkv, shape, parts),
        **solved,
        **attended,
        **shared,
    )


@triton.jit(**ANY_VALUE)
def _solve(  # type: ignore[no-untyped-def]
    mixed,
    b,
    a,
    decay,
    dt_bias,
    keys,
    inverses,
    starts,
    decodes,
    stride_b,
    stride_a,
    C: tl.constexpr,
    SHARED: tl.constexpr,
    KEYS: tl.constexpr,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    TOGETHER: tl.constexpr,
    EPSILON: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Solve for what the tokens of a step of a head write: ``inverses`` [T, heads, 2, TOGETHER]
    times the values, less ``keys`` [T, heads, K] times the state. Write both; an inverse is the sum
    of two tensors, see `_split`.
    """
    head, heads = tl.program_id(0), tl.num_programs(0)
    begin, end = bounds(starts, decodes + tl.program_id(2), decodes)
    begin += tl.program_id(1) * TOGETHER
    if begin >= end:
        return
    n = tl.arange(0, TOGETHER)
    i = tl.arange(0, K_PADDED)
    exists = begin + n < end
    token = (begin + n).to(tl.int64)
    own = token * heads + head
    is_key = exists[:, None] & (i < K)[None, :]
    of_key = mixed + token[:, None] * C + (KEYS + head // SHARED * K + i)[None, :]
    k = tl.load(of_key, mask=is_key, other=0.0)
    k_scale = _inverse_norm(k, EPSILON)
    rate = tl.load(b + token * stride_b + head, mask=exists, other=0.0).to(tl.float32)
    rate = tl.where(exists, tl.sigmoid(rate), 0.0)
    total, _ = _log_decays(a + token * stride_a, decay, dt_bias, head, exists)
    system = tl.dot(k, tl.trans(k), input_precision=PRECISION)
    system *= _decay_between(total, n) * (rate * k_scale)[:, None] * k_scale[None, :]
    system = tl.where(n[:, None] > n[None, :], system, 0.0)
    inverse = _inverse(system, TOGETHER, PRECISION) * rate[None, :]
    of_inverse = inverses + own[:, None] * (2 * TOGETHER) + n[None, :]
    high, low = _split(inverse, inverses.dtype.element_ty)
    tl.store(of_inverse, high, mask=exists[:, None])
    tl.store(of_inverse + TOGETHER, low, mask=exists[:, None])
    high, low = _split(inverse * (k_scale * tl.exp(total))[None, :], k.dtype)
    result = tl.dot(high, k, input_precision=PRECISION)
    result = tl.dot(low, k, result, input_precision=PRECISION)
    pointers = keys + own[:, None] * K + i[None, :]
    tl.store(pointers, result.to(keys.dtype.element_ty), mask=is_key)


@triton.jit(**ANY_VALUE)
def _attend(  # type: ignore[no-untyped-def]
    mixed,
    a,
    decay,
    dt_bias,
    attention,
    scales,
    starts,
    decodes,
    stride_a,
    C: tl.constexpr,
    SHARED: tl.constexpr,
    KEYS: tl.constexpr,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    TOGETHER: tl.constexpr,
    EPSILON: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the ``attention`` [T, heads, TOGETHER] of the queries of a step of a head to what its
    tokens write, and the factors ``scales`` [T, heads, 3]: of queries that read the state, of keys
    that write to it, and of the state itself.
    """
    head, heads = tl.program_id(0), tl.num_programs(0)
    begin, end = bounds(starts, decodes + tl.program_id(2), decodes)
    begin += tl.program_id(1) * TOGETHER
    if begin >= end:
        return
    n = tl.arange(0, TOGETHER)
    i = tl.arange(0, K_PADDED)
    exists = begin + n < end
    token = (begin + n).to(tl.int64)
    own = token * heads + head
    is_key = exists[:, None] & (i < K)[None, :]
    of_key = mixed + token[:, None] * C + (head // SHARED * K + i)[None, :]
    q = tl.load(of_key, mask=is_key, other=0.0)
    k = tl.load(of_key + KEYS, mask=is_key, other=0.0)
    q_scale, k_scale = _inverse_norm(q, EPSILON) * K**-0.5, _inverse_norm(k, EPSILON)
    total, last = _log_decays(a + token * stride_a, decay, dt_bias, head, exists)
    weight = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    weight *= _decay_between(total, n) * q_scale[:, None] * k_scale[None, :]
    of_attention = attention + own[:, None] * TOGETHER + n[None, :]
    tl.store(of_attention, weight, mask=exists[:, None])
    of_scale = scales + own * 3
    tl.store(of_scale, q_scale * tl.exp(total), mask=exists)
    tl.store(of_scale + 1, k_scale * tl.exp(last - total), mask=exists)
    tl.store(of_scale + 2, tl.exp(last) + tl.zeros_like(total), mask=exists)


@triton.jit
def _log_decays(a, decay, dt_bias, head, exists):  # type: ignore[no-untyped-def]
    """Return the logarithm of the decay from before a step to each of its tokens, [TOGETHER], and
    to its last.
    """
    logs = log_decay(tl.load(a + head, mask=exists, other=0.0), decay, dt_bias, head)
    logs = tl.where(exists, logs, 0.0)
    return tl.cumsum(logs, 0), tl.sum(logs, 0)


@triton.jit
def _decay_between(total, n):  # type: ignore[no-untyped-def]
    """Return the decay of what a token (column) wrote until a later one (row), 0 for earlier ones.

    Args:
        total: from `_log_decays`.
        n: the numbers of the tokens.
    """
    is_past = n[:, None] >= n[None, :]
    return tl.exp(tl.where(is_past, total[:, None] - total[None, :], float("-inf")))


@triton.jit
def _inverse_norm(x, EPSILON: tl.constexpr):  # type: ignore[no-untyped-def]
    x = x.to(tl.float32)
    return tl.rsqrt(tl.sum(x * x, 1) + EPSILON)


@triton.jit
def _inverse(  # type: ignore[no-untyped-def]
    system, TOGETHER: tl.constexpr, PRECISION: tl.constexpr
):
    """Return the inverse of 1 + ``system``; ``system`` is zero on and above its diagonal.

    Blocks on the diagonal are inverted first: of 4 rows, then of 16, then all 64. If B holds the
    inverses of the smaller blocks, and R what ``system`` has between them, the inverse of a larger
    block is (1 + B R)^-1 B. The fourth power of B R is zero, so its Neumann series has four terms;
    a series over more rows at once would add large numbers that cancel out. A step of Newton's
    method doubles the correct digits.
    """
    apart = tl.arange(0, TOGETHER)[:, None] ^ tl.arange(0, TOGETHER)[None, :]
    found = tl.where(apart == 0, 1.0, _neumann_series(tl.where(apart < 4, system, 0.0), PRECISION))
    for level in tl.static_range(1, 3):
        is_between = (apart >= 4**level) & (apart < 4 * 4**level)
        power = tl.dot(found, tl.where(is_between, system, 0.0), input_precision=PRECISION)
        rest = _neumann_series(power, PRECISION)
        found += tl.dot(rest, found, input_precision=PRECISION)
    missing = tl.where(apart == 0, 1.0, 0.0) - found
    missing -= tl.dot(system, found, input_precision="tf32x3")
    return found + tl.dot(found, missing, input_precision=PRECISION)


@triton.jit
def _neumann_series(power, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return (1 + N)^-1 - 1 = -N + N^2 - N^3 for ``power`` N, whose fourth power is zero."""
    square = tl.dot(power, power, input_precision=PRECISION)
    return square - power - tl.dot(power, square, input_precision=PRECISION)


@triton.jit
def _split(x, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return ``x``, f32, as the sum of two tensors of ``dtype``, for twice the digits of one."""
    high = x.to(dtype)
    return high, (x - high.to(tl.float32)).to(dtype)


@triton.jit(**ANY_VALUE)
def _add_chunks(  # type: ignore[no-untyped-def]
    x,
    mixed,
    keys,
    inverses,
    attention,
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
    """Write the results of a chunk, step by step, and its last state, for some values of a head."""
    head, part = tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    first, end = bounds(starts, decodes + tl.program_id(0), decodes)
    if first == end:
        return
    i = tl.arange(0, K_PADDED)
    j = part * VALUES + tl.arange(0, VALUES)
    n = tl.arange(0, TOGETHER)
    row, position = tl.load(rows + first).to(tl.int64), tl.load(positions + first)
    matrices, inside, state = load_state(
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
        solved_keys = tl.load(keys + own[:, None] * K + i[None, :], mask=is_key, other=0.0)
        of_inverse = inverses + own[:, None] * (2 * TOGETHER) + n[None, :]
        inverse = tl.load(of_inverse, mask=exists[:, None], other=0.0)
        low = tl.load(of_inverse + TOGETHER, mask=exists[:, None], other=0.0)
        v = tl.load(
            mixed + token[:, None] * C + (2 * KEYS + head * V + j)[None, :],
            mask=is_value,
            other=0.0,
        )
        q = tl.load(of_key, mask=is_key, other=0.0)
        k = tl.load(of_key + KEYS, mask=is_key, other=0.0)
        weight = tl.load(
            attention + own[:, None] * TOGETHER + n[None, :], mask=exists[:, None], other=0.0
        )
        q_scale = tl.load(scales + own * 3, mask=exists, other=0.0)
        k_scale = tl.load(scales + own * 3 + 1, mask=exists, other=0.0)
        kept = tl.load(scales + (start * heads + head) * 3 + 2)
        rounded_state = state.to(k.dtype)
        new = tl.dot(inverse, v, input_precision=PRECISION)
        new = tl.dot(low, v, new, input_precision=PRECISION)
        written = new - tl.dot(solved_keys, rounded_state, input_precision=PRECISION)
        result = tl.dot(q, rounded_state, input_precision=PRECISION) * q_scale[:, None]
        result = tl.dot(weight, written, result, input_precision=PRECISION)
        pointers = out + own[:, None] * V + j[None, :]
        tl.store(pointers, result.to(out.dtype.element_ty), mask=is_value)
        high, low = _split(written * k_scale[:, None], k.dtype)
        state = tl.dot(tl.trans(k), high, state * kept, input_precision=PRECISION)
        state = tl.dot(tl.trans(k), low, state, input_precision=PRECISION)
    tl.store(matrices, state, mask=inside)
