"""What the kernels of gated delta nets share: the tokens of a sequence, its state, and decays."""

# ruff: noqa: N803 (constants of a Triton kernel are written in capitals)
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qtool.engine.delta_rule import Shape

# arguments whose values must not make Triton compile a kernel again
ANY_VALUE = {
    "do_not_specialize": ["decodes"],
    "do_not_specialize_on_alignment": ["starts", "rows", "positions"],
}


def kept_channels(qkv: Tensor, shape: Shape, parts: int) -> dict[str, int]:
    """Return the arguments of `load_state` that say how many channels each program keeps the last
    inputs of, when a head has ``parts`` programs.
    """
    kept = triton.cdiv(qkv.shape[1], shape.value_heads * parts)
    return {"KEPT": kept, "KEPT_PADDED": triton.next_power_of_2(kept)}


@triton.jit
def bounds(starts, sequence, decodes):  # type: ignore[no-untyped-def]
    """Return the first token of ``sequence`` and the one after its last."""
    begin, end = sequence, sequence + 1
    if starts is not None:
        chunk = tl.maximum(sequence - decodes, 0)
        is_chunk = sequence >= decodes
        begin = tl.where(is_chunk, decodes + tl.load(starts + chunk), begin)
        end = tl.where(is_chunk, decodes + tl.load(starts + chunk + 1), end)
    return begin, end


@triton.jit
def log_decay(a, decay, dt_bias, head):  # type: ignore[no-untyped-def]
    """Return the logarithm of the decay, ``decay`` times the softplus of ``a`` + ``dt_bias``."""
    size = a.to(tl.float32) + tl.load(dt_bias + head)
    return tl.load(decay + head) * tl.where(size > 20, size, tl.log(1 + tl.exp(size)))


@triton.jit
def load_state(  # type: ignore[no-untyped-def]
    x,
    conv,
    matrix,
    row,
    position,
    begin,
    end,
    head,
    part,
    i,
    j,
    stride_x,
    C: tl.constexpr,
    INPUTS: tl.constexpr,
    KEPT: tl.constexpr,
    KEPT_PADDED: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
):
    """Return pointers to the state of keys ``i`` and values ``j`` of a head, a mask of those that
    exist, and the state, zeros if the sequence begins here. Also write the program's share of the
    last inputs to ``conv``, for the convolution of later steps.
    """
    first = (head * tl.num_programs(2) + part) * KEPT
    conv += row * (C * INPUTS)
    _keep_inputs(x, conv, begin, end, position, first, stride_x, C, INPUTS, KEPT, KEPT_PADDED)
    pointers = matrix + ((row * tl.num_programs(1) + head) * K + i[:, None]) * V + j[None, :]
    inside = (i < K)[:, None] & (j < V)[None, :]
    return pointers, inside, tl.load(pointers, mask=inside & (position > 0), other=0.0)


@triton.jit
def _keep_inputs(  # type: ignore[no-untyped-def]
    x,
    state,
    begin,
    end,
    position,
    first,
    stride_x,
    C: tl.constexpr,
    INPUTS: tl.constexpr,
    KEPT: tl.constexpr,
    KEPT_PADDED: tl.constexpr,
):
    """Write the last inputs of the ``KEPT`` channels from ``first`` on to ``state``."""
    n = tl.arange(0, KEPT_PADDED)
    c = first + n
    inside = (n < KEPT) & (c < C)
    x += begin.to(tl.int64) * stride_x
    count = end - begin
    for index in range(tl.maximum(0, count - INPUTS), count):
        value = tl.load(x + index * stride_x + c, mask=inside)
        tl.store(state + (position + index) % INPUTS * C + c, value, mask=inside)
