"""Weights of 8 bits times inputs rounded to 8 bits, int8 or fp8 E4M3, in Triton.

There is one scale for each output and each token, or for all of them.
"""

# ruff: noqa: N803 (constants of a Triton kernel are written in capitals)
from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtool.runtime.experts.gates import Gate
from qtool.runtime.experts.routing import Blocks
from qtool.runtime.kernels import Device, LinearSpec
from qtool.runtime.triton.row_quantize import quantize_rows
from qtool.runtime.triton.tiles import (
    GLUON,
    Table,
    Tile,
    counters,
    pick,
    prefetch,
    start_early,
    store_gated,
    store_tile,
    tile_position,
    workspace,
)
from qtool.weight import QuantizedWeight

_FP8: Table = {  # found on an H200 with tests/benchmarks/sweep.py
    (16, "any"): Tile(64, 16, 256, 264, 4, 5, pdl=True),
    (16, "wide"): Tile(64, 16, 256, 396, 4, 4, pdl=True),
    (64, "any"): Tile(64, 64, 256, 132, 4, 5, pdl=True),
    (64, "wide"): Tile(64, 64, 128, 264, 4, 6, pdl=True),
    (256, "small"): Tile(128, 128, 128, 132, 8, 6, bulk=True),
    (256, "deep"): Tile(128, 128, 128, 132, 8, 5, pdl=True),
    (256, "wide"): Tile(256, 128, 128, 132, 8, 4, bulk=True),
    (0, "any"): Tile(256, 128, 128, 132, 8, 4, bulk=True),
}
_INT8: Table = {
    **_FP8,
    (256, "deep"): Tile(128, 64, 128, 264, 4, 4),
    (256, "wide"): Tile(128, 128, 128, 132, 8, 6, bulk=True),
}
TILES: Mapping[str, Table] = {"int8": _INT8, "fp8": _FP8}


def unsupported_reason(spec: LinearSpec, device: Device) -> str | None:
    """Support int8 or fp8 weights and inputs of the same format.

    Weights have a scale for each output or one for all, inputs one for each token or a static one.
    """
    weights = spec.scheme.weights
    if device.capability != 90:
        return f"it is written for sm_90, not {device}"
    row_scales = weights.granularity in ("channel", "tensor") and weights.symmetric
    if weights.format not in TILES or not row_scales:
        return f"it supports int8 or fp8 weights with a scale a row, not {weights}"
    if spec.dtype not in (torch.bfloat16, torch.float16):
        return f"its inputs have 16 bits, not {spec.dtype}"
    return _unsupported_inputs(spec)


def _unsupported_inputs(spec: LinearSpec) -> str | None:
    weights, inputs = spec.scheme.weights, spec.scheme.activations
    if inputs is None or inputs.format != weights.format or not inputs.symmetric:
        return f"its inputs are symmetric {weights.format}"
    if inputs.granularity == "tensor" and not spec.static_input:
        return "it finds scales for each token, not for all together"
    if inputs.granularity not in ("token", "tensor") or inputs.scale != "float":
        return f"it has no inputs of {inputs}"
    return None


def pack(spec: LinearSpec, weight: QuantizedWeight) -> dict[str, Tensor]:
    """Keep the codes as they are."""
    packed = {
        "data": weight.data,
        "scale": weight.scale.float().expand(spec.shape[0], -1)[:, 0].contiguous(),
        "counters": counters(weight.data.device),
    }
    if weight.activation and weight.activation.scale is not None:
        packed["input_scale"] = weight.activation.scale.float().reshape(1)
    return packed


def apply(spec: LinearSpec, x: Tensor, packed: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
    """Multiply, cut as `TILES` says."""
    return multiply(
        spec, x, packed, bias, pick(TILES[spec.scheme.weights.format], x.shape[0], *spec.shape)
    )


def apply_codes(
    spec: LinearSpec,
    codes: Tensor,
    row_scale: Tensor,
    packed: Mapping[str, Tensor],
    bias: Tensor | None,
) -> Tensor:
    """Multiply what is rounded already."""
    return multiply(
        spec,
        codes,
        packed,
        bias,
        pick(TILES[spec.scheme.weights.format], codes.shape[0], *spec.shape),
        row_scale=row_scale,
    )


def multiply(
    spec: LinearSpec,
    x: Tensor,
    packed: Mapping[str, Tensor],
    bias: Tensor | None,
    tile: Tile,
    row_scale: Tensor | None = None,
) -> Tensor:
    """Multiply, cut as ``tile`` says; with ``row_scale``, ``x`` is rounded to codes already."""
    (tokens, columns), rows = x.shape, spec.shape[0]
    if row_scale is None:
        static = packed.get("input_scale") if spec.static_input else None
        x, row_scale = quantize_rows(
            x, "fp8" if spec.scheme.weights.format == "fp8" else "int8", static, pdl=True
        )
    # rows of whole 16 bytes, as TMA needs them
    if tile.bulk and GLUON and rows % 8 == columns % 16 == 0:
        from qtool.runtime.kernels.gluon_w8a8 import multiply_codes

        return multiply_codes(x, row_scale, packed["data"], packed["scale"], bias, spec.dtype, tile)
    steps = triton.cdiv(columns, tile.k)
    parts = tile.split(rows, tokens, steps)
    y = x.new_empty(tokens, rows, dtype=spec.dtype)
    grid = (triton.cdiv(rows, tile.n) * triton.cdiv(tokens, tile.m), parts)
    _multiply[grid](
        x=x,
        row_scale=row_scale,
        data=packed["data"],
        scale=packed["scale"],
        bias=bias,
        y=y,
        partial=workspace(x, parts, rows),
        arrived=packed["counters"],
        block_rows=None,
        block_experts=None,
        rows_used=None,
        M=tokens,
        N=rows,
        K=columns,
        M_TILED=tokens,
        stack_rows=rows,
        steps_each=triton.cdiv(steps, parts),
        INT8=x.dtype == torch.int8,
        BLOCKS=False,
        EVEN=columns % tile.k == 0,
        TILE_N=tile.n,
        TILE_M=tile.m,
        TILE_K=tile.k,
        SPLIT=parts > 1,
        TOP_K=1,
        GATE=None,
        PDL=tile.pdl,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **({"launch_pdl": True} if tile.pdl else {}),
    )
    return y


def multiply_blocks(
    x: Tensor,
    row_scale: Tensor | None,
    packed: Mapping[str, Tensor],
    bias: Tensor | None,
    shape: tuple[int, int],
    dtype: torch.dtype,
    tile: Tile,
    blocks: Blocks,
    gate: Gate | None = None,
) -> Tensor:
    """Multiply the choices of ``blocks``, each with the weight of its expert.

    Args:
        x: codes, or numbers of 16 bits: [choices / blocks.top_k, K], contiguous.
        row_scale: of the codes, f32 [rows of x, 1], or [rows of x, K / 128] with blocks.
        packed: ``data``, [experts * N, K], and ``scale``, f32 [experts * N], or [K / 128,
            experts * N] with blocks; none for 16 bits.
        bias: [experts * N], or None.
        shape: N, K.
        dtype: of the result.
        tile: how the work is cut; ``tile.m`` is the size of a block.
        blocks: which choices each expert has.
        gate: what to do with the outputs, gate and up by turns; the result is then [choices, N /
            2], else [choices, N].
    """
    rows, columns = shape
    y = x.new_empty(blocks.choices, rows // 2 if gate else rows, dtype=dtype)
    most = blocks.rows.shape[0]
    scale = packed.get("scale")
    _multiply[(triton.cdiv(rows, tile.n) * triton.cdiv(most, tile.m), 1)](
        x=x,
        row_scale=row_scale,
        data=packed["data"],
        scale=scale,
        bias=bias,
        y=y,
        partial=y,
        arrived=y,
        block_rows=blocks.rows,
        block_experts=blocks.experts,
        rows_used=blocks.used,
        M=blocks.choices,
        N=rows,
        K=columns,
        M_TILED=most,
        stack_rows=packed["data"].shape[0],
        steps_each=triton.cdiv(columns, tile.k),
        INT8=x.dtype == torch.int8,
        BLOCKS=scale is not None and scale.dim() == 2,
        EVEN=columns % tile.k == 0,
        TILE_N=tile.n,
        TILE_M=tile.m,
        TILE_K=tile.k,
        SPLIT=False,
        TOP_K=blocks.top_k,
        GATE=gate.constants if gate else None,
        PDL=tile.pdl,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **({"launch_pdl": True} if tile.pdl else {}),
    )
    return y


@triton.jit(do_not_specialize=["M", "M_TILED", "steps_each"])
def _multiply(  # type: ignore[no-untyped-def]
    x,
    row_scale,
    data,
    scale,
    bias,
    y,
    partial,
    arrived,
    block_rows,
    block_experts,
    rows_used,
    M,
    N,
    K,
    M_TILED,
    stack_rows,
    steps_each,
    INT8: tl.constexpr,
    BLOCKS: tl.constexpr,
    EVEN: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_K: tl.constexpr,
    SPLIT: tl.constexpr,
    TOP_K: tl.constexpr,
    GATE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Multiply the rows ``m`` of ``x`` with the rows ``n`` of a weight [N, K].

    With blocks, ``m`` are choices, and ``n`` rows of a stack [experts * N, K]. ``BLOCKS``: there
    are scales for each 128 inputs, of ``x`` [M, K / 128] and of the weight [K / 128, N].
    """
    tile_n, tile_m = tile_position(M_TILED, N, TILE_M, TILE_N)
    n = tile_n * TILE_N + tl.arange(0, TILE_N)
    m = tile_m * TILE_M + tl.arange(0, TILE_M)
    k = tl.arange(0, TILE_K)
    first = tl.program_id(1) * steps_each * TILE_K
    if PDL and block_rows is None:  # the first weights come while the input is awaited
        lines = tl.minimum(first + tl.arange(0, TILE_K // 32) * 128, K - 1)  # of four steps
        prefetch(data + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K + lines[None, :])
    start_early(PDL)
    if block_rows is None:
        stack, row = n * 0, m
    else:
        if tile_m * TILE_M >= tl.load(rows_used):
            return
        stack = n * 0 + tl.load(block_experts + tile_m) * N
        m = tl.load(block_rows + m)
        row = m // TOP_K
    weight_row = stack + tl.minimum(n, N - 1)
    weights = data + weight_row.to(tl.int64)[:, None] * K + k[None, :]
    inputs = x + row.to(tl.int64)[:, None] * K + k[None, :]
    acc = tl.zeros((TILE_N, TILE_M), tl.int32 if INT8 else tl.float32)
    for start in range(first, tl.minimum(first + steps_each * TILE_K, K), TILE_K):
        if EVEN:
            weight = tl.load(weights + start)
            columns = tl.load(inputs + start, mask=m[:, None] < M, other=0.0)
        else:
            weight = tl.load(weights + start, mask=start + k[None, :] < K, other=0.0)
            columns = tl.load(
                inputs + start, mask=(m[:, None] < M) & (start + k[None, :] < K), other=0.0
            )
        if BLOCKS:
            width = tl.cdiv(K, 128)
            block = start // 128
            of_weight = tl.load(scale + block * stack_rows + weight_row)
            of_input = tl.load(row_scale + row * width + block, mask=m < M, other=0.0)
            product = tl.dot(weight, tl.trans(columns))
            acc += product * of_weight[:, None] * of_input[None, :]
        else:
            acc = tl.dot(weight, tl.trans(columns), acc, out_dtype=acc.dtype)
    total = acc.to(tl.float32)
    if scale is not None and not BLOCKS:
        total *= tl.load(scale + weight_row, mask=n < N, other=0.0)[:, None]
    if row_scale is not None and not BLOCKS:
        total *= tl.load(row_scale + row, mask=m < M, other=0.0)[None, :]
    if bias is not None and block_rows is not None:
        total += tl.load(bias + weight_row, mask=n < N, other=0.0).to(tl.float32)[:, None]
    if GATE is None:
        store_tile(
            total,
            n,
            m,
            y,
            partial,
            arrived,
            bias if block_rows is None else None,
            M,
            N,
            SPLIT,
        )
    else:
        store_gated(total, tile_n * TILE_N, m, y, M, N, GATE, TILE_N, TILE_M)
