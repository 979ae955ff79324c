"""Weights of 8 bits times inputs rounded to 8 bits, int8 or fp8 E4M3, in Triton.

There is one scale for each output and each token, or for all of them; or, of fp8, for each 128 x
128 weights and each 128 inputs of a token.
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
from qtool.scheme import Activations
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
_BLOCKS: Table = {
    (16, "any"): Tile(128, 16, 128, 264, 4, 5, pdl=True),
    (16, "wide"): Tile(128, 16, 128, 132, 4, 5, pdl=True),
    (64, "any"): Tile(64, 64, 128, 264, 4, 6, pdl=True),
    (64, "wide"): Tile(128, 64, 128, 132, 4, 4, pdl=True),
    (0, "any"): Tile(128, 128, 128, 132, 8, 4, bulk=True) if GLUON else Tile(64, 128, 128, 0, 4, 3),
}
BLOCK = 128
"""Weights along each side of a block, and inputs of a token, under one scale."""


def tiles(spec: LinearSpec) -> Table:
    """Return how products with such layers are cut."""
    if in_blocks(spec):
        return _BLOCKS
    return _FP8 if spec.scheme.weights.format == "fp8" else _INT8


def in_blocks(spec: LinearSpec) -> bool:
    """Return whether weights and inputs are fp8 with a scale for each block."""
    weights, inputs = spec.scheme.weights, spec.scheme.activations
    is_fp8 = weights.format == "fp8" and weights.block == (BLOCK, BLOCK)
    return is_fp8 and inputs == Activations("fp8", "group", BLOCK)


def unsupported_reason(spec: LinearSpec, device: Device) -> str | None:
    """Support int8 or fp8 weights and inputs of the same format, and fp8 in blocks.

    Weights have a scale for each output or one for all, inputs one for each token or a static one.
    """
    weights = spec.scheme.weights
    if device.capability != 90:
        return f"it is written for sm_90, not {device}"
    row_scales = weights.granularity in ("channel", "tensor") and weights.symmetric
    if weights.block == (BLOCK, BLOCK) and not in_blocks(spec):
        return f"its blocks are fp8, with inputs in groups of {BLOCK}, not {spec.scheme}"
    if weights.format not in ("int8", "fp8") or not (row_scales or in_blocks(spec)):
        return f"it supports int8 or fp8 weights with a scale a row, not {weights}"
    if in_blocks(spec) and spec.shape[1] % BLOCK:
        return f"its inputs come in groups of {BLOCK}, which do not divide {spec.shape[1]}"
    if spec.dtype not in (torch.bfloat16, torch.float16):
        return f"its inputs have 16 bits, not {spec.dtype}"
    return None if in_blocks(spec) else _unsupported_inputs(spec)


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
    """Keep the codes as they are; scales of blocks become [K / 128, N / 128]."""
    scale = weight.scale.float()
    packed = {
        "data": weight.data,
        "scale": (
            scale.T if in_blocks(spec) else scale.expand(spec.shape[0], -1)[:, 0]
        ).contiguous(),
        "counters": counters(weight.data.device),
    }
    if weight.activation and weight.activation.scale is not None:
        packed["input_scale"] = weight.activation.scale.float().reshape(1)
    return packed


def apply(spec: LinearSpec, x: Tensor, packed: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
    """Multiply, cut as `tiles` says."""
    return multiply(spec, x, packed, bias, pick(tiles(spec), x.shape[0], *spec.shape))


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
        pick(tiles(spec), codes.shape[0], *spec.shape),
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
        x, row_scale = _quantize_input(spec, x, packed)
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
        stride_scale=triton.cdiv(rows, BLOCK),
        steps_each=triton.cdiv(steps, parts),
        INT8=x.dtype == torch.int8,
        SCALE_ROWS=BLOCK if in_blocks(spec) else 0,
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


def _quantize_input(
    spec: LinearSpec, x: Tensor, packed: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the codes of ``x`` [M, K] and their scales, f32 [M, 1], or [M, K / 128] in blocks."""
    if in_blocks(spec):
        return quantize_groups(x, BLOCK)
    static = packed.get("input_scale") if spec.static_input else None
    return quantize_rows(
        x, "fp8" if spec.scheme.weights.format == "fp8" else "int8", static, pdl=True
    )


def quantize_groups(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the fp8 codes of ``x`` [M, K], and the scales of its groups, f32 [M, K / size]."""
    codes, scale = quantize_rows(x.reshape(-1, size), "fp8", pdl=True)
    return codes.view(x.shape), scale.view(x.shape[0], -1)


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
        stride_scale=packed["data"].shape[0],
        steps_each=triton.cdiv(columns, tile.k),
        INT8=x.dtype == torch.int8,
        SCALE_ROWS=1 if scale is not None and scale.dim() == 2 else 0,
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


@triton.jit(do_not_specialize=["M", "M_TILED", "steps_each", "stride_scale"])
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
    stride_scale,
    steps_each,
    INT8: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
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

    With blocks, ``m`` are choices, and ``n`` rows of a stack [experts * N, K]. With ``SCALE_ROWS``
    there are scales for each 128 inputs: of ``x`` [M, K / 128], and for so many rows of the weight
    [K / 128, rows / SCALE_ROWS].
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
    if SCALE_ROWS:
        of_inputs = row_scale + row * (K // 128)
        of_weights = scale + weight_row // SCALE_ROWS
        if SCALE_ROWS >= TILE_N:
            of_weights = scale + tile_n * TILE_N // SCALE_ROWS
        of_input, of_weight = _scales(of_inputs, of_weights, first // 128, m, M, K, stride_scale)
    for start in range(first, tl.minimum(first + steps_each * TILE_K, K), TILE_K):
        if EVEN:
            weight = tl.load(weights + start)
            columns = tl.load(inputs + start, mask=m[:, None] < M, other=0.0)
        else:
            weight = tl.load(weights + start, mask=start + k[None, :] < K, other=0.0)
            columns = tl.load(
                inputs + start, mask=(m[:, None] < M) & (start + k[None, :] < K), other=0.0
            )
        if SCALE_ROWS:
            # the next scales come while this step multiplies
            block = start // 128 + 1
            next_scales = _scales(of_inputs, of_weights, block, m, M, K, stride_scale)
            product = tl.dot(weight, tl.trans(columns))
            if SCALE_ROWS >= TILE_N:
                acc += product * (of_input * of_weight)[None, :]
            else:
                acc += product * of_weight[:, None] * of_input[None, :]
            of_input, of_weight = next_scales
        else:
            acc = tl.dot(weight, tl.trans(columns), acc, out_dtype=acc.dtype)
    total = acc.to(tl.float32)
    if scale is not None and SCALE_ROWS == 0:
        total *= tl.load(scale + weight_row, mask=n < N, other=0.0)[:, None]
    if row_scale is not None and SCALE_ROWS == 0:
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


@triton.jit
def _scales(of_inputs, of_weights, block, m, M, K, stride_scale):  # type: ignore[no-untyped-def]
    """Return the scales of the inputs and of the weights in ``block``; past the last any."""
    block = tl.minimum(block, K // 128 - 1)
    of_input = tl.load(of_inputs + block, mask=m < M, other=0.0)
    return of_input, tl.load(of_weights + block * stride_scale)
