"""Activations of gated layers, in Triton."""

# ruff: noqa: N803 (constants of a Triton kernel are written in capitals)
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gate_times_up(  # type: ignore[no-untyped-def]
    gate,
    up,
    KIND: tl.constexpr,
    ALPHA: tl.constexpr = 1.0,
    LIMIT: tl.constexpr = None,
    OFFSET: tl.constexpr = 0.0,
):
    """Return ``activation(gate) * (up + OFFSET)`` in their dtype, rounded where models round; see
    `qtool.runtime.experts.gates.Gate`.
    """
    dtype: tl.constexpr = gate.dtype
    x, factor = gate.to(tl.float32), up.to(tl.float32)
    if LIMIT is not None:
        x = tl.minimum(x, LIMIT)
        factor = tl.minimum(tl.maximum(factor, -LIMIT), LIMIT)
    if OFFSET != 0:
        factor = (factor + OFFSET).to(dtype).to(tl.float32)
    # (1 + tanh(y)) / 2 = sigmoid(2 y), and 2 sqrt(2 / pi) = 1.59..
    slope = x * ALPHA if KIND == "swiglu" else 1.5957691216057308 * (x + 0.044715 * x * x * x)
    active = x * _share(slope * -1.4426950408889634)  # in units of log2
    return (active.to(dtype).to(tl.float32) * factor).to(dtype)


@triton.jit
def _share(x):  # type: ignore[no-untyped-def]
    """Return ``1 / (1 + 2^x)``, f32, in three instructions.

    `tl.exp2` and division also handle subnormal numbers, which costs more than all the rest.
    """
    share: tl.constexpr = (
        "{.reg .f32 y; ex2.approx.ftz.f32 y, $1; add.f32 y, y, 0f3F800000; rcp.approx.ftz.f32 "
        "$0, y;}"
    )
    return tl.inline_asm_elementwise(share, "=f,f", [x], tl.float32, is_pure=True, pack=1)
