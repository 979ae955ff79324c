"""Tiles of Triton matmuls: how the work is cut, and how parts are added up.

All matmuls compute ``W x^T`` in tiles [TILE_N, TILE_M]: the weight is then the operand with the 64
rows that the tensor cores of Hopper need, however few tokens there are. If there are too few tiles
to fill the GPU, K is cut as well (split-K). Each part then goes to a workspace, and the last
program of a tile to arrive adds the parts in a fixed order, so that results never depend on timing.
"""

# ruff: noqa: N803, N806 (constants of a Triton kernel are written in capitals)
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qtool.runtime.triton.gates import gate_times_up

# Gluon is experimental: with versions of Triton that were not tested, other kernels are used
GLUON_VERSION = "3.6"
GLUON = triton.__version__.startswith(f"{GLUON_VERSION}.")
COUNTERS = 8192  # tiles that may be cut along K
# tiles of tokens that neighbouring programs take, so that they share weights in the L2 cache
BAND = 16


@dataclass(frozen=True)
class Tile:
    """How a matmul is cut."""

    n: int
    """Outputs of a tile."""
    m: int
    """Tokens of a tile."""
    k: int
    """Inputs of a step."""
    programs: int = 0
    """About how many programs there should be; 0: K is never cut."""
    warps: int = 4
    stages: int = 4
    pdl: bool = False
    """Whether the kernel starts while the one before it ends."""
    bulk: bool = False
    """Whether a warp of its own loads whole tiles by TMA (`gluon_w8a8`)."""

    def split(self, n: int, m: int, steps: int) -> int:
        """Return into how many parts to cut ``steps`` steps along K, each of at least two.

        The output has ``n`` outputs of ``m`` tokens.
        """
        tiles = triton.cdiv(n, self.n) * triton.cdiv(m, self.m)
        parts = max(1, min(self.programs // tiles, steps // 2)) if tiles <= COUNTERS else 1
        return int(triton.cdiv(steps, triton.cdiv(steps, parts)))  # no part is empty


# (most tokens, class of the shape or "any") -> Tile; 0 tokens: any number
Table = Mapping[tuple[int, str], Tile]


def pick(table: Table, tokens: int, n: int, k: int) -> Tile:
    """Return the entry of ``table`` for ``tokens`` tokens and a weight [n, k]."""
    most = next((most for most in sorted({most for most, _ in table}) if tokens <= most), 0)
    return table.get((most, shape_class(n, k))) or table[most, "any"]


def shape_class(n: int, k: int) -> str:
    """Return ``wide``, ``deep`` or ``small`` for a weight [n, k].

    Wide ones have tiles for the whole GPU, deep ones few tiles with long sums, small ones neither.
    """
    if n >= 16384:
        return "wide"
    return "deep" if k >= 2 * n else "small"


def counters(device: torch.device) -> Tensor:
    """Return the counters of a layer's tiles, which every launch leaves at zero."""
    return torch.zeros(COUNTERS, dtype=torch.int32, device=device)


def workspace(x: Tensor, parts: int, n: int) -> Tensor:
    """Allocate the ``parts`` parts of an output for the tokens ``x``."""
    return x.new_empty((parts, x.shape[0], n) if parts > 1 else 1, dtype=torch.float32)


@triton.jit
def tile_position(M, N, TILE_M: tl.constexpr, TILE_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return which tile (of outputs, of tokens) this program computes.

    Neighbours share weights, 16 tiles of tokens at a time.
    """
    tiles_m, tiles_n = tl.cdiv(M, TILE_M), tl.cdiv(N, TILE_N)
    band = tl.program_id(0) // (16 * tiles_n)
    rest = tl.program_id(0) % (16 * tiles_n)
    height = tl.minimum(tiles_m - band * 16, 16)
    return rest // height, band * 16 + rest % height


@cache
def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors ``device`` has; for the meta device, an H200's."""
    return (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 132
    )


@triton.jit
def start_early(PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Allow the next kernel to start, and wait for the output of the one before."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def prefetch(pointers):  # type: ignore[no-untyped-def]
    """Bring the 128 bytes around each of ``pointers`` to the L2 cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def store_tile(  # type: ignore[no-untyped-def]
    acc,
    n,
    m,
    y,
    partial,
    arrived,
    bias,
    M,
    N,
    SPLIT: tl.constexpr,
):
    """Write ``acc`` [TILE_N, TILE_M], f32, plus ``bias`` to ``y`` [M, N].

    With several parts, the last program to arrive does so, after it has added all parts.
    """
    offsets = m.to(tl.int64)[None, :] * N + n[:, None]
    inside = (n[:, None] < N) & (m[None, :] < M)
    if SPLIT:
        parts = tl.num_programs(1)
        size = tl.cast(M, tl.int64) * N
        tl.store(partial + tl.program_id(1) * size + offsets, acc, mask=inside)
        tl.debug_barrier()
        if tl.atomic_add(arrived + tl.program_id(0), 1, sem="acq_rel") != parts - 1:
            return
        tl.store(arrived + tl.program_id(0), 0)
        acc = tl.zeros_like(acc)
        for part in range(parts):
            acc += tl.load(
                partial + part * size + offsets, mask=inside, other=0.0, cache_modifier=".cg"
            )
    if bias is not None:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    tl.store(y + offsets, acc.to(y.dtype.element_ty), mask=inside)


@triton.jit
def store_gated(  # type: ignore[no-untyped-def]
    acc,
    first,
    m,
    y,
    M,
    N,
    GATE: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_M: tl.constexpr,
):
    """Write ``activation(gate) * up`` to ``y`` [M, N / 2], from output ``first`` on.

    Args:
        acc: gate and up by turns, f32 [TILE_N, TILE_M].
        GATE: kind, alpha, limit and offset of a `Gate`.
    """
    pairs = acc.to(y.dtype.element_ty).reshape(TILE_N // 2, 2, TILE_M).permute(0, 2, 1)
    gate, up = tl.split(pairs)
    n = first // 2 + tl.arange(0, TILE_N // 2)
    KIND: tl.constexpr = GATE[0]
    ALPHA: tl.constexpr = GATE[1]
    LIMIT: tl.constexpr = GATE[2]
    OFFSET: tl.constexpr = GATE[3]
    value = gate_times_up(gate, up, KIND, ALPHA, LIMIT, OFFSET)
    offsets = m.to(tl.int64)[None, :] * (N // 2) + n[:, None]
    tl.store(y + offsets, value, mask=(n[:, None] < N // 2) & (m[None, :] < M))
