"""Products of 8-bit codes for many tokens, in Gluon for sm_90: one warp loads, two groups multiply.

Triton waits for each int8 product before it starts the next (3.6: ``warp_group_dot_wait {pendings =
0}``), and does not specialize warps in int8 loops. Here the next product is always queued, and
loads go on while a tile is scaled and stored.
"""

# Constants of a kernel are written in capitals; Gluon has no stars in lists.
# ruff: noqa: N803, N806, RUF005
from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from qtool.runtime.triton.tiles import BAND, Tile

TYPES = {
    torch.int8: gl.int8,
    torch.float8_e4m3fn: gl.float8e4nv,
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
}
# outputs that a group stores at once: 16 KiB each fit next to four stages of loads
STORED = 8192


def multiply_codes(
    codes: Tensor,
    row_scale: Tensor,
    data: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    tile: Tile,
) -> Tensor:
    """Return ``codes`` times ``data``, times their scales, plus ``bias``: [M, N].

    Args:
        codes: the input, [M, K]; K is a multiple of 16.
        row_scale: of the tokens, f32 [M, 1]; or of each 128 inputs, [M, K / 128].
        data: the weight, [N, K]; N is a multiple of 8.
        scale: of the outputs, f32 [N]; or of blocks of 128 x 128, [K / 128, N / 128].
        bias: [N], or None.
        dtype: of the result.
        tile: ``tile.programs`` programs go through the tiles, each over all of K; ``tile.m`` is 128
            or 256, half for each group; with blocks ``tile.n`` is 128.
    """
    (tokens, columns), rows, half = codes.shape, data.shape[0], tile.m // 2
    y = codes.new_empty((tokens, rows), dtype=dtype)
    tiles = triton.cdiv(tokens, tile.m) * triton.cdiv(rows, tile.n)
    _multiply[(min(tile.programs, tiles),)](
        x=_blocks(codes, half, tile.k),
        data=_blocks(data, tile.n, tile.k),
        y=_blocks(y, half, min(tile.n, STORED // half)),
        row_scale=row_scale,
        scale=scale,
        bias=bias,
        M=tokens,
        N=rows,
        K=columns,
        BAND=BAND,
        STAGES=tile.stages,
        BLOCKS=scale.dim() == 2,
        num_warps=4,
    )
    return y


def _blocks(tensor: Tensor, *shape: int) -> TensorDescriptor:
    """Return a descriptor of ``tensor`` in blocks of ``shape``."""
    return TensorDescriptor.from_tensor(
        tensor, list(shape), gl.NVMMASharedLayout.get_default_for(list(shape), TYPES[tensor.dtype])
    )


@gluon.jit(do_not_specialize=["M"])
def _multiply(  # type: ignore[no-untyped-def]
    x,
    data,
    y,
    row_scale,
    scale,
    bias,
    M,
    N,
    K,
    BAND: gl.constexpr,
    STAGES: gl.constexpr,
    BLOCKS: gl.constexpr,
):
    # two groups of tokens a stage
    inputs = gl.allocate_shared_memory(x.dtype, [2 * STAGES] + x.block_type.shape, x.layout)
    weights = gl.allocate_shared_memory(data.dtype, [STAGES] + data.block_type.shape, data.layout)
    stored = gl.allocate_shared_memory(y.dtype, [2] + y.block_type.shape, y.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    gl.warp_specialize(
        [
            (
                _consume_blocks if BLOCKS else _consume,
                (0, inputs, weights, stored, full, empty, y, row_scale, scale, bias, M, N, K, BAND),
            ),
            (
                _consume_blocks if BLOCKS else _consume,
                (1, inputs, weights, stored, full, empty, y, row_scale, scale, bias, M, N, K, BAND),
            ),
            (_produce, (x, data, inputs, weights, full, empty, M, N, K, BAND)),
        ],
        [4, 1],
        [240, 24],  # registers; the first group also gets 240
    )


@gluon.jit
def _position(  # type: ignore[no-untyped-def]
    tile,
    M,
    N,
    TILE_M: gl.constexpr,
    TILE_N: gl.constexpr,
    BAND: gl.constexpr,
):
    """Return the first token and the first output of a tile.

    Neighbours share weights, `BAND` tiles of tokens at a time.
    """
    tiles_m, tiles_n = gl.cdiv(M, TILE_M), gl.cdiv(N, TILE_N)
    band, rest = tile // (BAND * tiles_n), tile % (BAND * tiles_n)
    height = gl.minimum(tiles_m - band * BAND, BAND)
    return (band * BAND + rest % height) * TILE_M, rest // height * TILE_N


@gluon.jit
def _produce(  # type: ignore[no-untyped-def]
    x,
    data,
    inputs,
    weights,
    full,
    empty,
    M,
    N,
    K,
    BAND: gl.constexpr,
):
    """Load the operands of all steps of all tiles, each as soon as both groups are done with its
    place.
    """
    STAGES: gl.constexpr = weights.shape[0]
    TILE_N: gl.constexpr = weights.shape[1]
    TILE_K: gl.constexpr = weights.shape[2]
    HALF: gl.constexpr = inputs.shape[1]
    step = 0
    for tile in range(
        gl.program_id(0), gl.cdiv(M, 2 * HALF) * gl.cdiv(N, TILE_N), gl.num_programs(0)
    ):
        m, n = _position(tile, M, N, 2 * HALF, TILE_N, BAND)
        for k in range(0, K, TILE_K):
            stage = step % STAGES
            loaded = full.index(stage)
            # at first nothing is waited for
            mbarrier.wait(empty.index(stage), (step // STAGES + 1) % 2)
            mbarrier.expect(loaded, 2 * x.block_type.nbytes + data.block_type.nbytes)
            tma.async_copy_global_to_shared(x, [m, k], loaded, inputs.index(2 * stage))
            tma.async_copy_global_to_shared(data, [n, k], loaded, weights.index(stage))
            tma.async_copy_global_to_shared(x, [m + HALF, k], loaded, inputs.index(2 * stage + 1))
            step += 1


@gluon.jit
def _consume(  # type: ignore[no-untyped-def]
    GROUP: gl.constexpr,
    inputs,
    weights,
    stored,
    full,
    empty,
    y,
    row_scale,
    scale,
    bias,
    M,
    N,
    K,
    BAND: gl.constexpr,
):
    """Compute half the tokens of all tiles, the first or the second by ``GROUP``."""
    STAGES: gl.constexpr = weights.shape[0]
    TILE_N: gl.constexpr = weights.shape[1]
    TILE_K: gl.constexpr = weights.shape[2]
    HALF: gl.constexpr = inputs.shape[1]
    WIDTH: gl.constexpr = stored.shape[2]
    INT8: gl.constexpr = weights.dtype == gl.int8
    SUM: gl.constexpr = gl.int32 if INT8 else gl.float32
    # Triton has no int8 product of 256 outputs
    INSTRUCTION: gl.constexpr = [
        16,
        128 if INT8 and TILE_N > 128 else TILE_N,
        32,
    ]
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], INSTRUCTION)
    step = 0
    for tile in range(
        gl.program_id(0), gl.cdiv(M, 2 * HALF) * gl.cdiv(N, TILE_N), gl.num_programs(0)
    ):
        m, n = _position(tile, M, N, 2 * HALF, TILE_N, BAND)
        acc = warpgroup_mma_init(gl.zeros((HALF, TILE_N), SUM, MMA))
        for k in range(0, K, TILE_K):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), step // STAGES % 2)
            acc = warpgroup_mma(
                inputs.index(2 * stage + GROUP),
                weights.index(stage).permute((1, 0)),
                acc,
                is_async=True,
            )
            # the product before this one is done
            acc = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[acc]))
            gl.thread_barrier()  # in all four warps
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=k > 0)
            step += 1
        sums = warpgroup_mma_wait(0, deps=[acc])
        gl.thread_barrier()
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
        parts = _cut(sums, TILE_N // WIDTH)
        for i in gl.static_range(TILE_N // WIDTH):
            _store(
                parts[i],
                m + GROUP * HALF,
                n + i * WIDTH,
                stored.index(GROUP),
                y,
                row_scale,
                scale,
                bias,
                M,
                N,
            )
    tma.store_wait(0)


@gluon.jit
def _consume_blocks(  # type: ignore[no-untyped-def]
    GROUP: gl.constexpr,
    inputs,
    weights,
    stored,
    full,
    empty,
    y,
    row_scale,
    scale,
    bias,
    M,
    N,
    K,
    BAND: gl.constexpr,
):
    """Do what `_consume` does, and scale the product of each step; meanwhile the other group
    multiplies.

    With more outputs a sum and a product would not fit in the registers.
    """
    STAGES: gl.constexpr = weights.shape[0]
    TILE_N: gl.constexpr = weights.shape[1]
    TILE_K: gl.constexpr = weights.shape[2]
    HALF: gl.constexpr = inputs.shape[1]
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_N, 32])
    gl.static_assert(TILE_N == 128 and TILE_K == 128)
    blocks = gl.cdiv(N, TILE_N)
    step = 0
    for tile in range(gl.program_id(0), gl.cdiv(M, 2 * HALF) * blocks, gl.num_programs(0)):
        m, n = _position(tile, M, N, 2 * HALF, TILE_N, BAND)
        rows = m + GROUP * HALF + gl.arange(0, HALF, gl.SliceLayout(1, MMA))
        of_inputs = row_scale + rows * (K // TILE_K)
        of_weights = scale + n // TILE_N
        total = gl.zeros((HALF, TILE_N), gl.float32, MMA)
        factor = gl.load(of_inputs, mask=rows < M, other=0.0) * gl.load(of_weights)
        for k in range(0, K, TILE_K):
            stage = step % STAGES
            # the next scales come while this step multiplies
            of_inputs += 1
            of_weights += blocks
            more = k + TILE_K < K
            of_input = gl.load(of_inputs, mask=(rows < M) & more, other=0.0)
            of_weight = gl.load(of_weights, mask=more, other=0.0)
            mbarrier.wait(full.index(stage), step // STAGES % 2)
            product = warpgroup_mma(
                inputs.index(2 * stage + GROUP),
                weights.index(stage).permute((1, 0)),
                gl.zeros((HALF, TILE_N), gl.float32, MMA),
                use_acc=False,
                is_async=True,
            )
            product = warpgroup_mma_wait(0, deps=[product])
            gl.thread_barrier()
            mbarrier.arrive(empty.index(stage))
            total += product * factor[:, None]
            factor = of_input * of_weight
            step += 1
        _store(total, m + GROUP * HALF, n, stored.index(GROUP), y, None, None, bias, M, N)
    tma.store_wait(0)


@gluon.jit
def _cut(sums, PARTS: gl.constexpr):  # type: ignore[no-untyped-def]
    """Return the columns of ``sums`` in ``PARTS`` tensors, in order."""
    if PARTS == 1:
        return (sums,)
    else:
        left, right = sums.reshape(sums.shape[0], 2, sums.shape[1] // 2).permute(0, 2, 1).split()
        return _cut(left, PARTS // 2) + _cut(right, PARTS // 2)


@gluon.jit
def _store(sums, m, n, stored, y, row_scale, scale, bias, M, N):  # type: ignore[no-untyped-def]
    """Write ``sums`` times their scales, if any, to ``y`` from [m, n] on, through ``stored``."""
    LAYOUT: gl.constexpr = sums.type.layout
    rows = m + gl.arange(0, sums.shape[0], gl.SliceLayout(1, LAYOUT))
    columns = n + gl.arange(0, sums.shape[1], gl.SliceLayout(0, LAYOUT))
    total = sums.to(gl.float32)
    if scale is not None:
        total *= gl.load(scale + columns, mask=columns < N, other=0.0)[None, :]
        total *= gl.load(row_scale + rows, mask=rows < M, other=0.0)[:, None]
    if bias is not None:
        total += gl.load(bias + columns, mask=columns < N, other=0.0).to(gl.float32)[None, :]
    tma.store_wait(0)
    stored.store(total.to(y.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(y, [m, n], stored)
