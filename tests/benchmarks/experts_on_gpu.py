"""Layers of experts on a GPU: are they right, and how long do the products take?

    python tests/benchmarks/experts_on_gpu.py right
    python tests/benchmarks/experts_on_gpu.py sweep --scheme FP8_DYNAMIC [--tokens 1,64,8192]

``right``: all schemes, 1 to 4096 tokens, 2 to 512 experts, top 1 to 10, against the definition; a
CUDA graph must give the same bits. ``sweep``: microseconds of both products of Qwen3-30B-A3B's
shape by tile, the fastest first, with the time that reading the weights or multiplying takes at
least: what `qtool.runtime.experts.triton_experts.TILES` is made of.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (1, 2)]

from support.experts import Case  # noqa: E402

from qtool.runtime.experts import triton_experts  # noqa: E402
from qtool.runtime.experts.gates import Gate  # noqa: E402
from qtool.runtime.experts.packing import part  # noqa: E402
from qtool.runtime.experts.routing import Blocks  # noqa: E402
from qtool.runtime.kernels import LinearSpec  # noqa: E402
from qtool.runtime.kernels import triton_w8a8 as w8a8  # noqa: E402
from qtool.runtime.kernels import triton_weight_only as weight_only  # noqa: E402
from qtool.runtime.triton.routing import sort_choices  # noqa: E402
from qtool.runtime.triton.row_quantize import quantize_rows  # noqa: E402
from qtool.runtime.triton.tiles import Tile  # noqa: E402

SCHEMES = (
    *("FP8_DYNAMIC", "FP8", "W8A8", "FP8_BLOCK", "W4A16", "W4A16_ASYM", "W8A16"),
    *("NVFP4A16", "NVFP4", "MXFP4A16"),
)
LAYERS = (  # experts, hidden, inner, top k
    (8, 512, 256, 2),
    (128, 256, 128, 8),
    (2, 384, 256, 1),
    (512, 256, 128, 10),
)
# between both products, inputs of 4 bits move by a whole code where 16 bits round otherwise
LIMIT = {"NVFP4": 6e-2}
BANDWIDTH = 4.1e12
RATE = {8: 1.5e15, 4: 0.8e15}  # of the tensor cores, by the bits of weights: 4 bits become 16


def check() -> int:
    wrong = 0
    for scheme in SCHEMES:
        worst = 0.0
        for (experts, hidden, inner, top_k), tokens in itertools.product(
            LAYERS, (1, 7, 64, 500, 4096)
        ):
            case = Case(
                scheme,
                gate="clamped" if scheme == "MXFP4A16" else "silu",
                experts=experts,
                hidden=hidden,
                inner=inner,
                tokens=tokens,
                top_k=top_k,
                has_bias=scheme in ("MXFP4A16", "W4A16_ASYM"),
                crowded=tokens == 500,
                device="cuda",
            )
            error = case.error(triton_experts)
            worst = max(worst, error)
            if not error <= LIMIT.get(scheme, 1e-2) or not replays(case):
                wrong += 1
                print(f"WRONG {case}: {error:.1e}", flush=True)
        print(f"{scheme:12} largest relative error {worst:.1e}", flush=True)
    return wrong


def replays(case: Case) -> bool:
    """Whether a CUDA graph of the layer gives the bits that a call gives."""
    spec, weights = case.layer()
    packed = triton_experts.pack(spec, weights)
    x, experts, factors = case.inputs()
    expected = triton_experts.apply(spec, x, experts, factors, packed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = triton_experts.apply(spec, x, experts, factors, packed)
    graph.replay()
    return torch.equal(found, expected)


def microseconds(run: Callable[[], object], count: int = 10) -> float:
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            run()
    graph.replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / count * 1e3


def tiles(product: str, each: float) -> Iterator[Tile]:
    """Yield the tiles to try for ``each`` tokens of an expert on average."""
    sizes = (16,) if each <= 10 else (16, 32) if each <= 40 else (64, 128, 256)
    for m, n, k, warps, stages in itertools.product(
        sizes, (64, 128, 256), (128, 256), (4, 8), (2, 3, 4)
    ):
        too_large = n * m > 128 * 256 or (product == "blocks" and k != 128)
        if not too_large and (warps == 4 or n * m > 64 * 64):
            yield Tile(n, m, k, 0, warps, stages, pdl=m <= 32)


def sweep(scheme: str, tokens: int) -> None:
    case = Case(scheme, experts=128, hidden=2048, inner=768, tokens=tokens, top_k=8, device="cuda")
    spec, weights = case.layer()
    packed = triton_experts.pack(spec, weights)
    x, experts, _ = case.inputs()
    inner = torch.randn(tokens * 8, 768, device="cuda", dtype=case.dtype)
    bits, active = spec.up.scheme.weights.bits, len(experts.unique())
    for name, linear, rows in (("up", spec.up, x), ("down", spec.down, inner)):
        outputs, inputs = linear.shape
        least = 1e6 * max(
            active * outputs * inputs * bits / 8 / BANDWIDTH,
            2 * tokens * 8 * outputs * inputs / RATE[bits],
        )
        multiply = product_of(linear, rows, packed, name, gate=spec.gate)
        found = []
        for tile in tiles(triton_experts._product(linear), tokens * 8 / 128):
            blocks = sort_choices(experts, 128, tile.m)
            if name == "down":
                blocks = blocks.of_own_rows()
            try:
                found.append((round(microseconds(partial(multiply, tile, blocks)), 1), tile))
            except OutOfResources:
                continue
        print(f"{scheme} {tokens} tokens, {active} experts, {name}: at least {least:.1f} us")
        for time, tile in sorted(found, key=lambda each: each[0])[:5]:
            print(f"  {time:8.1f} us {time / least:5.2f}  {tile}", flush=True)


def product_of(
    linear: LinearSpec, rows: Tensor, packed: dict[str, Tensor], name: str, gate: Gate
) -> Callable[[Tile, Blocks], Tensor]:
    """Return one of the two products, without the rounding of its input."""
    product, inputs = triton_experts._product(linear), linear.shape[1]
    tensors = part(packed, name)
    own = gate if name == "up" else None
    if product == "weight_only":
        plain = triton_experts._without_inputs(linear)
        return lambda tile, blocks: weight_only.multiply_blocks(
            plain, rows, tensors, None, tile, blocks, own
        )
    width = 128 if product == "blocks" else inputs
    codes, scale = quantize_rows(rows.reshape(-1, width), "fp8")
    codes, scale = codes.reshape(-1, inputs), scale.reshape(-1, inputs // width)
    return lambda tile, blocks: w8a8.multiply_blocks(
        codes, scale, tensors, None, linear.shape, linear.dtype, tile, blocks, own
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["right", "sweep"])
    parser.add_argument("--scheme", default="FP8_DYNAMIC")
    parser.add_argument("--tokens", default="1,16,64,256,1024,8192")
    options = parser.parse_args()
    if options.what == "right":
        sys.exit(1 if check() else 0)
    for tokens in map(int, options.tokens.split(",")):
        sweep(options.scheme, tokens)


if __name__ == "__main__":
    main()
