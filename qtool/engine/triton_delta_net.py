"""Gated delta nets in Triton: the short convolution, then the states, token after token.

Sequences, heads and parts of a head's values run side by side, the tokens of a sequence do not.
"""

# ruff: noqa: N803 (constants of a Triton kernel are written in capitals)
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qtool.engine.attention.pages import Packed, StateSlots
from qtool.engine.delta_rule import EPSILON, Shape

CHANNELS = 64  # of a program of the convolution
TOKENS = 16  # likewise
VALUES = 32  # of a head, in a program


def mix(
    qkv: Tensor,
    b: Tensor,
    a: Tensor,
    conv_weight: Tensor,
    decay: Tensor,
    dt_bias: Tensor,
    shape: Shape,
    slots: StateSlots,
    packed: Packed,
) -> Tensor:
    """Do what `delta_rule.mix` does."""
    qkv, b, a = qkv.contiguous(), b.contiguous(), a.contiguous()
    (tokens, channels), kernel = qkv.shape, conv_weight.shape[1]
    mixed = qkv.new_empty(tokens, channels)
    out = qkv.new_empty(tokens, shape.value_heads, shape.value_width)
    chunks = 0 if packed.starts is None else packed.starts.numel() - 1
    sequences = packed.decodes + chunks
    where = {
        "starts": packed.starts,
        "rows": packed.rows,
        "positions": packed.positions,
        "decodes": packed.decodes,
    }
    longest = packed.longest if chunks else 1
    grid = sequences, triton.cdiv(channels, CHANNELS), triton.cdiv(longest, TOKENS)
    _convolve[grid](
        x=qkv,
        weight=conv_weight,
        state=slots.conv,
        out=mixed,
        **where,
        C=channels,
        KERNEL=kernel,
        CHANNELS=CHANNELS,
        TOKENS=TOKENS,
        num_warps=2,
    )
    parts = triton.cdiv(shape.value_width, VALUES)
    kept = triton.cdiv(channels, shape.value_heads * parts)
    _update[(sequences, shape.value_heads, parts)](
        x=qkv,
        mixed=mixed,
        b=b,
        a=a,
        decay=decay,
        dt_bias=dt_bias,
        conv=slots.conv,
        matrix=slots.matrix,
        out=out,
        **where,
        C=channels,
        KERNEL=kernel,
        KEPT=kept,
        KEPT_PADDED=triton.next_power_of_2(kept),
        SHARED=shape.shared,
        KEYS=shape.key_heads * shape.key_width,
        K=shape.key_width,
        K_PADDED=triton.next_power_of_2(shape.key_width),
        V=shape.value_width,
        VALUES=VALUES,
        EPSILON=EPSILON,
        num_warps=4,
    )
    return out


@triton.jit
def _bounds(starts, sequence, decodes):  # type: ignore[no-untyped-def]
    """Return the first token of ``sequence`` and the one after its last."""
    begin, end = sequence, sequence + 1
    if starts is not None:
        chunk = tl.maximum(sequence - decodes, 0)
        is_chunk = sequence >= decodes
        begin = tl.where(is_chunk, decodes + tl.load(starts + chunk), begin)
        end = tl.where(is_chunk, decodes + tl.load(starts + chunk + 1), end)
    return begin, end


@triton.jit
def _inputs(  # type: ignore[no-untyped-def]
    x, state, begin, place, c, inside, fresh, C: tl.constexpr, KERNEL: tl.constexpr
):
    """Return the inputs of the channels ``c`` at ``place`` of a sequence; those before its chunk
    come from its ``state``, and are zeros if it is ``fresh``.
    """
    here = tl.load(x + (begin + place).to(tl.int64) * C + c, mask=inside & (place >= 0), other=0.0)
    before = tl.load(
        state + c * (KERNEL - 1) + KERNEL - 1 + place,
        mask=inside & (place < 0) & (place > -KERNEL) & (fresh == 0),
        other=0.0,
    )
    return tl.where(place >= 0, here, before)


@triton.jit(do_not_specialize=["decodes"], do_not_specialize_on_alignment=["rows", "positions"])
def _convolve(  # type: ignore[no-untyped-def]
    x,
    weight,
    state,
    out,
    starts,
    rows,
    positions,
    decodes,
    C: tl.constexpr,
    KERNEL: tl.constexpr,
    CHANNELS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Write the convolution of ``x`` [T, C] over the last ``KERNEL`` inputs, and its SiLU."""
    begin, end = _bounds(starts, tl.program_id(0), decodes)
    first = tl.program_id(2) * TOKENS
    if begin + first >= end:
        return
    c = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    t = (first + tl.arange(0, TOKENS))[:, None]
    inside = (c < C) & (begin + t < end)
    fresh = (tl.load(positions + begin) == 0).to(tl.int32)
    state += tl.load(rows + begin).to(tl.int64) * (C * (KERNEL - 1))
    total = tl.zeros((TOKENS, CHANNELS), tl.float32)
    for i in tl.static_range(KERNEL):
        value = _inputs(x, state, begin, t - (KERNEL - 1) + i, c, inside, fresh, C, KERNEL)
        factor = tl.load(weight + c * KERNEL + i, mask=c < C, other=0.0)
        total += value.to(tl.float32) * factor.to(tl.float32)
    total = total.to(out.dtype.element_ty).to(tl.float32)
    total *= tl.sigmoid(total)
    tl.store(out + (begin + t).to(tl.int64) * C + c, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["decodes"], do_not_specialize_on_alignment=["rows", "positions"])
def _update(  # type: ignore[no-untyped-def]
    x,
    mixed,
    b,
    a,
    decay,
    dt_bias,
    conv,
    matrix,
    out,
    starts,
    rows,
    positions,
    decodes,
    C: tl.constexpr,
    KERNEL: tl.constexpr,
    KEPT: tl.constexpr,
    KEPT_PADDED: tl.constexpr,
    SHARED: tl.constexpr,
    KEYS: tl.constexpr,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    V: tl.constexpr,
    VALUES: tl.constexpr,
    EPSILON: tl.constexpr,
):
    """Go through the tokens of a sequence with some values of a head, and keep a share of its last
    inputs.
    """
    begin, end = _bounds(starts, tl.program_id(0), decodes)
    if begin == end:
        return
    head, part = tl.program_id(1), tl.program_id(2)
    heads, parts = tl.num_programs(1), tl.num_programs(2)
    row = tl.load(rows + begin).to(tl.int64)
    fresh = (tl.load(positions + begin) == 0).to(tl.int32)
    _keep_inputs(
        x,
        conv + row * (C * (KERNEL - 1)),
        begin,
        end,
        (head * parts + part) * KEPT,
        fresh,
        C,
        KERNEL,
        KEPT,
        KEPT_PADDED,
    )
    i = tl.arange(0, K_PADDED)
    j = part * VALUES + tl.arange(0, VALUES)
    place = matrix + ((row * heads + head) * K + i[:, None]) * V + j[None, :]
    inside = (i < K)[:, None] & (j < V)[None, :]
    state = tl.load(place, mask=inside & (fresh == 0), other=0.0)
    decay = tl.load(decay + head)
    bias = tl.load(dt_bias + head)
    keys = mixed + head // SHARED * K + i
    values = mixed + 2 * KEYS + head * V + j
    for t in range(begin, end):
        token = tl.cast(t, tl.int64)
        q = tl.load(keys + token * C, mask=i < K, other=0.0).to(tl.float32)
        k = tl.load(keys + token * C + KEYS, mask=i < K, other=0.0).to(tl.float32)
        v = tl.load(values + token * C, mask=j < V, other=0.0).to(tl.float32)
        rate = tl.sigmoid(tl.load(b + token * heads + head).to(tl.float32))
        size = tl.load(a + token * heads + head).to(tl.float32) + bias
        size = tl.where(size > 20, size, tl.log(1 + tl.exp(size)))
        q *= tl.rsqrt(tl.sum(q * q, 0) + EPSILON) * K**-0.5
        k *= tl.rsqrt(tl.sum(k * k, 0) + EPSILON)
        state *= tl.exp(decay * size)
        written = rate * (v - tl.sum(state * k[:, None], 0))
        state += k[:, None] * written[None, :]
        result = tl.sum(state * q[:, None], 0)
        tl.store(out + (token * heads + head) * V + j, result.to(out.dtype.element_ty), mask=j < V)
    tl.store(place, state, mask=inside)


@triton.jit
def _keep_inputs(  # type: ignore[no-untyped-def]
    x,
    state,
    begin,
    end,
    first,
    fresh,
    C: tl.constexpr,
    KERNEL: tl.constexpr,
    KEPT: tl.constexpr,
    KEPT_PADDED: tl.constexpr,
):
    """Write the last inputs of the ``KEPT`` channels from ``first`` on to ``state``."""
    n = tl.arange(0, KEPT_PADDED)
    c = first + n
    inside = (n < KEPT) & (c < C)
    # each place is read before any that comes later is written
    for i in tl.static_range(KERNEL - 1):
        place = end - begin - (KERNEL - 1) + i
        value = _inputs(x, state, begin, place, c, inside, fresh, C, KERNEL)
        tl.store(state + c * (KERNEL - 1) + i, value, mask=inside)
