"""Gated delta nets in Triton: the short convolution, then the states.

Sequences, heads and parts of a head's values run in parallel, the tokens of a sequence in order:
those of a chunk many at a time (`triton_delta_chunks`); a decode token by token, in one program
with the right drafts before it and the new drafts after it. The programs of these drafts end at
once, so that a graph of a fixed number of tokens serves sequences with any number of drafts.
"""

# ruff: noqa: N803 (constants of a Triton kernel are written in capitals)
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qtool.engine.attention.pages import Packed, RecurrentStates
from qtool.engine.delta_rule import EPSILON, DeltaWeights
from qtool.engine.elementwise import Codes, allocate_outputs, launch_options
from qtool.engine.triton_delta_chunks import add_chunks
from qtool.engine.triton_delta_state import ANY_VALUE, bounds, kept_channels, load_state, log_decay
from qtool.runtime.triton.row_quantize import codes_of, scale_of
from qtool.runtime.triton.tiles import start_early

CHANNELS = 128  # of a program of the convolution
TOKENS = 16  # of a program of the convolution
VALUES = 32  # of a head, in a program that decodes
HEAD_NUMBERS = 2048  # channels of all heads in a program of the norm, about


def mix(
    qkv: Tensor,
    b: Tensor,
    a: Tensor,
    weights: DeltaWeights,
    states: RecurrentStates,
    packed: Packed,
) -> Tensor:
    """Do what `delta_rule.mix` does, with its shapes."""
    # often columns of what one product gave for all
    qkv, b, a = (each if each.stride(1) == 1 else each.contiguous() for each in (qkv, b, a))
    shape = weights.shape
    out = qkv.new_empty(len(qkv), shape.value_heads, shape.value_width)
    mixed, behind = _launch_convolution(qkv, weights.conv, states, packed)
    if packed.decodes:
        parts = triton.cdiv(shape.value_width, VALUES)
        _decode[(packed.decodes, shape.value_heads, parts)](
            x=qkv,
            mixed=mixed,
            b=b,
            a=a,
            decay=weights.decay,
            dt_bias=weights.dt_bias,
            conv=states.conv_state,
            matrix=states.recurrent_state,
            out=out,
            rows=packed.rows,
            positions=packed.positions,
            drafted=states.drafted,
            behind=behind,
            decodes=packed.decodes,
            stride_x=qkv.stride(0),
            stride_b=b.stride(0),
            stride_a=a.stride(0),
            C=qkv.shape[1],
            INPUTS=states.conv_state.shape[1],
            **kept_channels(qkv, shape, parts),
            SHARED=shape.shared,
            KEYS=shape.key_heads * shape.key_width,
            K=shape.key_width,
            K_PADDED=max(16, triton.next_power_of_2(shape.key_width)),
            V=shape.value_width,
            VALUES=VALUES,
            EPSILON=EPSILON,
            DRAFTS=states.drafts,
            SPAN=triton.next_power_of_2(states.drafts + 1),
            num_warps=4,
        )
    if _sequences(packed) > packed.decodes:
        add_chunks(qkv, mixed, b, a, weights, states, packed, out)
    return out


def _launch_convolution(
    qkv: Tensor, conv_weight: Tensor, states: RecurrentStates, packed: Packed
) -> tuple[Tensor, Tensor]:
    """Return the convolution of all channels, [T, C], and how many drafts before each decode are
    still to be added to the matrix of its sequence, int32 [decodes].
    """
    channels = qkv.shape[1]
    mixed = qkv.new_empty(qkv.shape)
    behind = packed.rows.new_empty(packed.decodes)
    longest = packed.longest if packed.starts is not None else 1
    grid = _sequences(packed), triton.cdiv(channels, CHANNELS), triton.cdiv(longest, TOKENS)
    _convolve[grid](
        x=qkv,
        weight=conv_weight,
        state=states.conv_state,
        out=mixed,
        length=states.length,
        behind=behind,
        starts=packed.starts,
        rows=packed.rows,
        positions=packed.positions,
        decodes=packed.decodes,
        stride_x=qkv.stride(0),
        C=channels,
        KERNEL=conv_weight.shape[1],
        INPUTS=states.conv_state.shape[1],
        DRAFTS=states.drafts,
        CHANNELS=CHANNELS,
        TOKENS=TOKENS,
        num_warps=2,
    )
    return mixed, behind


def _sequences(packed: Packed) -> int:
    return packed.decodes + (0 if packed.starts is None else packed.starts.numel() - 1)


@triton.jit
def _is_at(rows, positions, token, exists, row, position):  # type: ignore[no-untyped-def]
    """Return whether a ``token`` that ``exists`` is the one of ``row`` at ``position``."""
    same = tl.load(rows + token, mask=exists, other=-1) == row
    return same & (tl.load(positions + token, mask=exists, other=-1) == position)


@triton.jit
def _inputs(  # type: ignore[no-untyped-def]
    x,
    state,
    rows,
    positions,
    begin,
    index,
    c,
    inside,
    row,
    position,
    stride_x,
    C: tl.constexpr,
    INPUTS: tl.constexpr,
    DRAFTS: tl.constexpr,
):
    """Return the inputs of the channels ``c`` of token ``index`` of a sequence of ``row`` that goes
    on at ``position`` with the token ``begin``; those before it come from its ``state``, or are
    zeros.
    """
    token = begin + index
    is_here = index >= 0
    if DRAFTS:  # a draft follows tokens of its own step
        exists = (index < 0) & (token >= 0)
        is_here |= _is_at(rows, positions, token, exists, row, position + index)
    here = tl.load(x + token.to(tl.int64) * stride_x + c, mask=inside & is_here, other=0.0)
    is_before = (position + index >= 0) & (is_here == 0)
    before = tl.load(
        state + (position + index) % INPUTS * C + c, mask=inside & is_before, other=0.0
    )
    return tl.where(is_here, here, before)


@triton.jit(**ANY_VALUE)
def _convolve(  # type: ignore[no-untyped-def]
    x,
    weight,
    state,
    out,
    length,
    behind,
    starts,
    rows,
    positions,
    decodes,
    stride_x,
    C: tl.constexpr,
    KERNEL: tl.constexpr,
    INPUTS: tl.constexpr,
    DRAFTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Write the convolution of ``x`` [T, C] over the last ``KERNEL`` inputs, and its SiLU."""
    begin, end = bounds(starts, tl.program_id(0), decodes)
    first = tl.program_id(2) * TOKENS
    if begin + first >= end:
        return
    c = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    t = (first + tl.arange(0, TOKENS))[:, None]
    inside = (c < C) & (begin + t < end)
    row, position = tl.load(rows + begin), tl.load(positions + begin)
    state += row.to(tl.int64) * (C * INPUTS)
    total = tl.zeros((TOKENS, CHANNELS), tl.float32)
    for i in tl.static_range(KERNEL):
        index = t - (KERNEL - 1) + i
        value = _inputs(
            x,
            state,
            rows,
            positions,
            begin,
            index,
            c,
            inside,
            row,
            position,
            stride_x,
            C,
            INPUTS,
            DRAFTS,
        )
        factor = tl.load(weight + c * KERNEL + i, mask=c < C, other=0.0)
        total += value.to(tl.float32) * factor.to(tl.float32)
    total = total.to(out.dtype.element_ty).to(tl.float32)
    total *= tl.sigmoid(total)
    tl.store(out + (begin + t).to(tl.int64) * C + c, total.to(out.dtype.element_ty), mask=inside)
    if DRAFTS:
        # one program for each sequence, before the matrices are read
        is_one = (first == 0) & (tl.program_id(1) == 0)
        is_decode = begin < decodes
        is_draft = _is_at(rows, positions, begin - 1, begin > 0, row, position - 1)
        known = tl.load(length + row, mask=is_one & (position > 0), other=0)
        known = tl.where(position > 0, known, 0)
        tl.store(behind + begin, position - known, mask=is_one & is_decode)
        stop = position + tl.where(is_decode, 1, end - begin)
        tl.store(length + row, stop, mask=is_one & (is_draft == 0))


@triton.jit(**ANY_VALUE)
def _decode(  # type: ignore[no-untyped-def]
    x,
    mixed,
    b,
    a,
    decay,
    dt_bias,
    conv,
    matrix,
    out,
    rows,
    positions,
    drafted,
    behind,
    decodes,
    stride_x,
    stride_b,
    stride_a,
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
    EPSILON: tl.constexpr,
    DRAFTS: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Go through one token of a sequence, and its drafts, with some values of a head."""
    token, head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    row, position = tl.load(rows + token).to(tl.int64), tl.load(positions + token)
    count = 1
    if DRAFTS:
        if _is_at(rows, positions, token - 1, token > 0, row, position - 1):
            return  # a draft
        n = tl.arange(0, SPAN)
        exists = (n <= DRAFTS) & (token + n < decodes)
        count = tl.sum(
            _is_at(rows, positions, token + n, exists, row, position + n).to(tl.int32), 0
        )
    i = tl.arange(0, K_PADDED)
    j = part * VALUES + tl.arange(0, VALUES)
    pointers, inside, state = load_state(
        x,
        conv,
        matrix,
        row,
        position,
        token,
        token + count,
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
    size: tl.constexpr = C - KEYS
    if DRAFTS:
        drafted += row * (2 * DRAFTS + 1) * (size + 2 * heads)
        right = tl.load(behind + token)
        for n in range(0, right):  # drafts that were right
            kept = drafted + (position - right + n) % (2 * DRAFTS + 1) * (size + 2 * heads)
            k = tl.load(kept + head // SHARED * K + i, mask=i < K, other=0.0)
            v = tl.load(kept + KEYS + head * V + j, mask=j < V, other=0.0)
            rate = tl.load(kept + size + head)
            logs = log_decay(tl.load(kept + size + heads + head), decay, dt_bias, head)
            state = _add_token(state, k, v, rate, logs, EPSILON)
    for n in range(0, count):
        at = token + n
        keys = mixed + at * C + head // SHARED * K + i
        q = tl.load(keys, mask=i < K, other=0.0).to(tl.float32)
        k = tl.load(keys + KEYS, mask=i < K, other=0.0)
        v = tl.load(mixed + at * C + 2 * KEYS + head * V + j, mask=j < V, other=0.0)
        rate = tl.load(b + at * stride_b + head)
        decayed = tl.load(a + at * stride_a + head)
        logs = log_decay(decayed, decay, dt_bias, head)
        state = _add_token(state, k, v, rate, logs, EPSILON)
        q *= tl.rsqrt(tl.sum(q * q, 0) + EPSILON) * K**-0.5
        result = tl.sum(state * q[:, None], 0)
        tl.store(out + (at * heads + head) * V + j, result.to(out.dtype.element_ty), mask=j < V)
        tl.store(pointers, state, mask=inside & (n == 0))
        if DRAFTS:
            kept = drafted + (position + n) % (2 * DRAFTS + 1) * (size + 2 * heads)
            is_first = (part == 0) & (head % SHARED == 0)
            tl.store(kept + head // SHARED * K + i, k, mask=(i < K) & is_first & (n > 0))
            tl.store(kept + KEYS + head * V + j, v, mask=(j < V) & (n > 0))
            tl.store(kept + size + head, rate, mask=(part == 0) & (n > 0))
            tl.store(kept + size + heads + head, decayed, mask=(part == 0) & (n > 0))


@triton.jit
def _add_token(state, k, v, rate, logs, EPSILON: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return ``state`` after a token."""
    k, v = k.to(tl.float32), v.to(tl.float32)
    k *= tl.rsqrt(tl.sum(k * k, 0) + EPSILON)
    state *= tl.exp(logs)
    written = tl.sigmoid(rate.to(tl.float32)) * (v - tl.sum(state * k[:, None], 0))
    return state + k[:, None] * written[None, :]


def gated_norm(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, codes: Codes | None
) -> tuple[Tensor, Tensor | None]:
    """Do what `gated_norm.GatedNorm` does; the heads of a token stand side by side in ``gate``."""
    tokens, heads, width = x.shape
    gate = gate if gate.stride()[1:] == (width, 1) else gate.contiguous()
    out, scale = allocate_outputs(x.view(tokens, -1), heads * width, codes)
    padded = triton.next_power_of_2(heads), triton.next_power_of_2(width)
    # codes have a scale for all heads of a token
    together = padded[0] if codes else max(1, min(padded[0], HEAD_NUMBERS // padded[1]))
    _gated_norm[(tokens, triton.cdiv(heads, together))](
        x=x.contiguous(),
        gate=gate,
        weight=weight,
        out=out,
        scales=scale,
        stride_gate_token=gate.stride(0),
        eps=eps,
        HEADS=heads,
        D=width,
        TOGETHER=together,
        D_PADDED=padded[1],
        FP8=codes == "fp8",
        **launch_options(x.device, together * padded[1]),
    )
    return out, scale


@triton.jit(do_not_specialize=["eps"])
def _gated_norm(  # type: ignore[no-untyped-def]
    x,
    gate,
    weight,
    out,
    scales,
    stride_gate_token,
    eps,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    TOGETHER: tl.constexpr,
    D_PADDED: tl.constexpr,
    FP8: tl.constexpr,
    PDL: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * TOGETHER + tl.arange(0, TOGETHER))[:, None]
    d = tl.arange(0, D_PADDED)[None, :]
    inside = (head < HEADS) & (d < D)
    channel = head * D + d
    dtype: tl.constexpr = x.dtype.element_ty
    factor = tl.load(weight + d, mask=d < D, other=0.0)
    start_early(PDL)
    value = tl.load(x + t * HEADS * D + channel, mask=inside, other=0.0).to(tl.float32)
    turned = tl.load(gate + t * stride_gate_token + channel, mask=inside, other=0.0).to(tl.float32)
    value = value * tl.rsqrt(tl.sum(value * value, 1, keep_dims=True) / D + eps)
    product = value.to(dtype).to(tl.float32) * factor.to(tl.float32)
    if factor.dtype == dtype:  # a wider weight makes the product as wide
        product = product.to(dtype).to(tl.float32)
    result = (product * (turned * tl.sigmoid(turned))).to(dtype)
    out += t * HEADS * D
    if scales is None:
        tl.store(out + channel, result, mask=inside)
    else:
        result = result.to(tl.float32)
        largest = tl.max(tl.max(tl.abs(result), 1, keep_dims=True), 0, keep_dims=True)
        scale = scale_of(largest, FP8)
        tl.store(scales + t + tl.zeros((1, 1), tl.int32), scale)
        tl.store(out + channel, codes_of(result, scale, FP8), mask=inside)
