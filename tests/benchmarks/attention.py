"""Check the attention kernels on this GPU against float64, and find the best `Tile` for decodes and
chunks of a Llama-3.1-8B layer.

``OUT=dir python tests/benchmarks/attention.py --seconds 60``: candidates compile in parallel, by
processes that do not touch the GPU. Decodes are timed in a CUDA graph, over layers enough to pass
the L2 cache; "only reading" is the time of a kernel that only reads as many bytes. The results are
also written to attention.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (0, 1, 2)]
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "engine"))
from gemm import microseconds  # noqa: E402
from test_attention import FP8, Batch  # noqa: E402

from qtool.engine.attention import interface as attention  # noqa: E402
from qtool.engine.attention import triton_paged  # noqa: E402
from qtool.engine.attention.pages import PAGE, KVPages, Packed, new_counters  # noqa: E402
from qtool.engine.attention.triton_paged import Tile  # noqa: E402
from qtool.runtime.triton.tiles import start_early  # noqa: E402

HEADS, KV_HEADS, HEAD_DIM, SCALING = 32, 8, 128, 128**-0.5
BF16 = torch.bfloat16
DEVICE = "cuda"
MOST = 5008
GEOMETRIES = {  # name -> shape of a layer, options of attention
    "8b": ({"heads": 32, "kv_heads": 8, "head_dim": 128}, {}),
    "8b fp8": ({"heads": 32, "kv_heads": 8, "head_dim": 128, "kv": FP8}, {}),
    "8b window": ({"heads": 32, "kv_heads": 8, "head_dim": 128}, {"window": 1000}),
    "8b short window, cap": (
        {"heads": 32, "kv_heads": 8, "head_dim": 128},
        {"window": 50, "softcap": 30.0},
    ),
    "64": ({"heads": 8, "kv_heads": 1, "head_dim": 64, "dtype": torch.float16}, {}),
    "80": ({"heads": 20, "kv_heads": 20, "head_dim": 80}, {}),
    "96": ({"heads": 32, "kv_heads": 32, "head_dim": 96}, {"window": 2047}),
    "256 cap": ({"heads": 16, "kv_heads": 8, "head_dim": 256}, {"softcap": 50.0}),
    "256 window, cap": (
        {"heads": 16, "kv_heads": 8, "head_dim": 256},
        {"window": 4096, "softcap": 50.0},
    ),
    "256 fp8": ({"heads": 8, "kv_heads": 1, "head_dim": 256, "kv": FP8}, {}),
    "7 share": ({"heads": 28, "kv_heads": 4, "head_dim": 128}, {}),
    "12 share": ({"heads": 24, "kv_heads": 2, "head_dim": 128}, {}),
    "192 and 128": ({"heads": 16, "kv_heads": 16, "head_dim": 192, "v_head_dim": 128}, {}),
    "f32": ({"heads": 8, "kv_heads": 2, "head_dim": 64, "dtype": torch.float32}, {}),
}
FEW = [(length - 1, 1) for length in (300, 5000)]
MANY = [
    (length - 1, 1)
    for length in (1, 2, 15, 16, 17, 33, 64, 65, 129, 300, 1000, 4097, 5000, *range(20, 420, 17))
]
PREFIXED = [(0, 700), (1024, 1024), (33, 1), (4000, 200), (15, 17), (0, 1), (128, 64)]
FIRST = [(0, 1), (0, 16), (0, 300), (0, 1500)]
DECODES = (
    *((1, 300), (1, 1000), (1, 4000), (1, 32000), (8, 16000)),
    *((16, 400), (64, 400), (64, 4000), (256, 640)),
)


def layer(
    device: str,
    pages: int,
    *,
    kv_heads: int,
    head_dim: int,
    v_head_dim: int = 0,
    dtype=BF16,
    kv=None,
    **_: object,
) -> KVPages:
    shapes = ((pages, kv_heads, PAGE, size) for size in (head_dim, v_head_dim or head_dim))
    scales = (0.03, 0.05) if kv == FP8 else (1.0, 1.0)
    return KVPages(
        *(torch.randn(shape, device=device, dtype=BF16).to(kv or dtype) for shape in shapes),
        *scales,
    )


def integers(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int32, device="meta")


def compile_geometry(name: str) -> None:
    """Compile, without a GPU, what `check` will run."""
    from support import triton_cpu

    triton_cpu.compile_only([])
    shape, options = GEOMETRIES[name]
    kv = layer("meta", 10, **shape)
    dtype = shape.get("dtype", BF16)
    q = torch.empty(4, shape["heads"], shape["head_dim"], dtype=dtype, device="meta")
    k, v = (
        torch.empty(4, shape["kv_heads"], part.shape[3], dtype=dtype, device="meta")
        for part in (kv.k, kv.v)
    )
    out = torch.empty(4, shape["heads"], kv.v.shape[3], dtype=dtype, device="meta")
    packed = Packed(integers(9, 9), integers(4), integers(4), 0, integers(3), 4, most=MOST)
    triton_paged.write(kv, k, v, packed)
    triton_paged.prefill(q, kv, packed, out, 0.1, options.get("window"), options.get("softcap"))
    for count in (len(FEW), len(MANY)):
        tile = triton_paged.decode_tile(
            count * shape["kv_heads"], MOST, shape["head_dim"], q.element_size()
        )
        triton_paged.decode(
            q,
            kv,
            replace(packed, decodes=4),
            out,
            0.1,
            options.get("window"),
            options.get("softcap"),
            tile=tile,
        )


def compile_decode(tile: Tile, kv: torch.dtype | None) -> None:
    from support import triton_cpu

    triton_cpu.compile_only([])
    pages = layer("meta", 10, kv_heads=KV_HEADS, head_dim=HEAD_DIM, kv=kv)
    q = torch.empty(4, HEADS, HEAD_DIM, dtype=BF16, device="meta")
    triton_paged.decode(
        q, pages, Packed(integers(4, 9), integers(4), integers(4), 4), q, SCALING, None, None, tile
    )


def compile_prefill(tile: Tile) -> None:
    from support import triton_cpu

    triton_cpu.compile_only([])
    pages = layer("meta", 10, kv_heads=KV_HEADS, head_dim=HEAD_DIM)
    q = torch.empty(4, HEADS, HEAD_DIM, dtype=BF16, device="meta")
    triton_paged.prefill(
        q,
        pages,
        Packed(integers(4, 9), integers(4), integers(4), 0, integers(3), 4),
        q,
        SCALING,
        None,
        None,
        tile=tile,
    )


def check(name: str) -> list[str]:
    """Compare with float64: few decodes, many, both before chunks with and without earlier tokens;
    and twice the same; and in a CUDA graph.
    """
    shape, options = GEOMETRIES[name]
    worst, found = 0.0, []
    for what, decodes, chunks in (
        ("few", FEW, PREFIXED),
        ("many", MANY, []),
        ("first", FEW, FIRST),
    ):
        torch.manual_seed(0)
        batch = Batch([*decodes, *chunks], **{"dtype": BF16, **shape}, device=DEVICE)
        packed = batch.packed(
            len(decodes), most=MOST, counters=new_counters(300, 32, torch.device(DEVICE))
        )
        result = batch.run(packed, scaling=0.1, **options)
        wanted = batch.expected(scaling=0.1, **options)
        sizes = [new for _, new in batch.chunks]
        for (before, new), own, right in zip(
            batch.chunks, result.double().split(sizes), wanted.split(sizes), strict=True
        ):
            error = float((own - right).norm() / right.norm())
            worst = max(worst, error)
            if not error < (1e-4 if shape.get("dtype") == torch.float32 else 2e-2):
                found.append(f"{name}, {what}: {before} + {new} tokens, relative error {error:.3g}")
        if not torch.equal(result, batch.run(packed, scaling=0.1, **options)):
            found.append(f"{name}, {what}: two runs differ")
        if packed.counters.any():
            found.append(f"{name}, {what}: counters are left")
    print(
        f"  {name}: largest relative error {worst:.2g}"
        + "".join(f"\n    WRONG {text}" for text in found[:8]),
        flush=True,
    )
    return found


def check_graph() -> list[str]:
    """Replay a captured decode at other positions than it was captured for."""
    batch = Batch(
        [(4000, 1), (700, 1), (16, 1)],
        heads=32,
        kv_heads=8,
        head_dim=128,
        dtype=BF16,
        device=DEVICE,
    )
    packed = batch.packed(counters=new_counters(3, 8, torch.device(DEVICE)))
    batch.run(packed, scaling=0.1)
    q, wanted = torch.cat(batch.q), batch.expected(scaling=0.1)
    positions = packed.positions.clone()
    packed.positions.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention.attend(q, batch.kv, packed, scaling=0.1)
    packed.positions.copy_(positions)
    graph.replay()
    error = float((out.double() - wanted).norm() / wanted.norm())
    print(
        f"  in a CUDA graph, captured for other positions: relative error {error:.2g}", flush=True
    )
    return [] if error < 2e-2 else [f"in a CUDA graph: relative error {error:.3g}"]


def decode_candidates(batch: int, context: int) -> list[Tile]:
    sizes = [
        (32, 1, 3),
        (32, 2, 3),
        (32, 2, 4),
        (64, 4, 3),
        (64, 4, 2),
        (64, 2, 2),
        (64, 2, 3),
        (32, 4, 4),
        (128, 4, 2),
        (64, 1, 2),
        (64, 1, 3),
        (128, 2, 2),
    ]
    cuts = {
        1: [(16, 1), (64, 1)],
        8: [(16, 1), (32, 1), (8, 1)],
        16: [(4, 1), (8, 1), (2, 1)],
        64: [(1, 1), (2, 1), (4, 1)],
        256: [(1, 1), (2, 1)],
    }[batch]
    if (batch, context) == (1, 32000):
        cuts = [(16, 1), (32, 1), (64, 1), (128, 1)]
    if (batch, context) == (64, 4000):
        cuts = [(1, 1), (4, 1), (8, 1)]
    tiles = [
        Tile(keys, warps, stages, parts=parts, least=least)
        for parts, least in cuts
        for keys, warps, stages in sizes
    ]
    if batch >= 64:  # what unused parts cost
        tiles += [
            Tile(keys, warps, stages, parts=8, least=999) for keys, warps, stages in sizes[:4]
        ]
    else:
        tiles += [replace(tile, pdl=False) for tile in tiles[3:4]]
    return tiles


@triton.jit
def _read(x, out, blocks, BLOCK: tl.constexpr):  # noqa: N803
    """Add blocks of ``x``; each is loaded while the one before it is added."""
    start_early(True)
    program, programs = tl.program_id(0), tl.num_programs(0)
    i = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int32)
    found = tl.load(x + program * BLOCK + i, mask=i < (blocks - program) * BLOCK, other=0)
    for block in range(program, blocks, programs):
        added, next_block = found, block + programs
        there = i < (blocks - next_block) * BLOCK
        found = tl.load(x + next_block * BLOCK + i, mask=there, other=0)
        total += added
    tl.store(out + program, tl.sum(total, 0))


def time_reading(size: int, copies: int) -> float:
    """Return how many microseconds a kernel takes that reads ``size`` bytes and does little else.

    Args:
        size: bytes that each launch reads.
        copies: launches of the graph, each with memory of its own.
    """
    block, programs = 2048, 1056
    layers = torch.zeros(copies, size // 4 // block * block, device=DEVICE, dtype=torch.int32)
    out = torch.empty(programs, device=DEVICE, dtype=torch.int32)

    def run() -> None:
        for layer in layers:
            blocks = layer.numel() // block
            _read[(programs,)](layer, out, blocks, BLOCK=block, num_warps=8, launch_pdl=True)

    return microseconds(run, replays=7) / copies


def time_decode(
    batch: int,
    context: int,
    kv: torch.dtype | None,
    tiles: Sequence[Tile | None],
    out_of_time: Callable[[], bool],
) -> list[dict]:
    width = -(-context // PAGE)
    size = batch * context * KV_HEADS * HEAD_DIM * 2 * (1 if kv else 2)
    copies = max(2, -(-int(200e6) // size))  # past the L2 cache
    layers = [
        layer(DEVICE, batch * width + 1, kv_heads=KV_HEADS, head_dim=HEAD_DIM, kv=kv)
        for _ in range(copies)
    ]
    table = (torch.randperm(batch * width, device=DEVICE) + 1).int().view(batch, width)
    rows = torch.arange(batch, device=DEVICE, dtype=torch.int32)
    packed = Packed(
        table,
        rows,
        torch.full_like(rows, context - 1),
        batch,
        counters=new_counters(batch, KV_HEADS, torch.device(DEVICE)),
    )
    q = torch.randn(batch, HEADS, HEAD_DIM, device=DEVICE, dtype=BF16)
    out = torch.empty_like(q)
    triton_paged.decode(q, layers[0], packed, out, SCALING, None, None)
    wanted = out.float()
    results = []
    for tile in tiles:
        if out_of_time():
            break
        entry: dict = {
            "batch": batch,
            "context": context,
            "kv": str(kv or BF16),
            "tile": asdict(tile) if tile else None,
        }
        try:
            out.fill_(torch.nan)
            triton_paged.decode(q, layers[0], packed, out, SCALING, None, None, tile=tile)
            error = float((out.float() - wanted).norm() / wanted.norm())
            assert error < 1e-2, f"relative error {error:.3g}"

            def run(tile=tile) -> None:
                for kv in layers:
                    triton_paged.decode(q, kv, packed, out, SCALING, None, None, tile=tile)

            us = microseconds(run, replays=7) / copies
            entry |= {"us": round(us, 2), "TB/s": round(size / us / 1e6, 2)}
        except Exception as error:
            entry["failed"] = f"{type(error).__name__}: {error}"[:300]
            if "CUDA error" in str(error):
                sys.exit(f"the GPU is lost to {entry}")
        results.append(entry)
    us = time_reading(size, copies)
    reading = {"tile": "only reading", "us": round(us, 2), "TB/s": round(size / us / 1e6, 2)}
    return [*results, reading]


PREFILL_TILES = [
    *(Tile(64, 8, stages, rows=128) for stages in (2, 3, 4)),
    *(Tile(128, 8, stages, rows=128) for stages in (2, 3)),
    *(Tile(64, 4, stages, rows=64) for stages in (2, 3)),
    Tile(128, 4, 2, rows=64),
    Tile(32, 8, 4, rows=128),
]


def time_prefill(
    chunks: Sequence[tuple[int, int]],
    tiles: Sequence[Tile | str | None],
    out_of_time: Callable[[], bool],
) -> list[dict]:
    lengths = torch.tensor([new for _, new in chunks])
    total = [before + new for before, new in chunks]
    width, tokens = -(-max(total) // PAGE), int(lengths.sum())
    kv = layer(DEVICE, len(chunks) * width + 1, kv_heads=KV_HEADS, head_dim=HEAD_DIM)
    table = (torch.randperm(len(chunks) * width, device=DEVICE) + 1).int().view(len(chunks), width)
    rows = torch.arange(len(chunks)).repeat_interleave(lengths).int().to(DEVICE)
    positions = (
        torch.cat([torch.arange(before, before + new) for before, new in chunks]).int().to(DEVICE)
    )
    starts = torch.tensor([0, *lengths.cumsum(0).tolist()], dtype=torch.int32, device=DEVICE)
    packed = Packed(table, rows, positions, 0, starts, int(lengths.max()))
    q, k, v = (
        torch.randn(tokens, heads, HEAD_DIM, device=DEVICE, dtype=BF16)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    attention.write(kv, k, v, packed)
    pairs = sum(before * new + new * (new + 1) / 2 for before, new in chunks)
    results = []
    out = torch.empty_like(q)
    triton_paged.prefill(q, kv, packed, out, SCALING, None, None)
    wanted = out.float()
    for tile in tiles:
        if out_of_time():
            break
        entry: dict = {
            "chunks": f"{len(chunks)} x {chunks[0]}",
            "tile": asdict(tile) if isinstance(tile, Tile) else tile,
        }
        try:
            if tile == "write":

                def run() -> Tensor:
                    attention.write(kv, k, v, packed)
                    return wanted
            else:

                def run(tile=tile) -> Tensor:
                    triton_paged.prefill(q, kv, packed, out, SCALING, None, None, tile=tile)
                    return out

            error = float((run().float() - wanted).norm() / wanted.norm())
            assert error < 1e-2, f"relative error {error:.3g}"
            us = microseconds(run, replays=5)
            entry |= {"us": round(us, 1), "TFLOP/s": round(pairs * HEADS * HEAD_DIM * 4 / us / 1e6)}
        except Exception as error:
            entry["failed"] = f"{type(error).__name__}: {error}"[:300]
            if "CUDA error" in str(error):
                sys.exit(f"the GPU is lost to {entry}")
        results.append(entry)
    return results


def show(what: str, results: list[dict], count: int = 6) -> None:
    def brief(entry: dict) -> str:
        tile = entry["tile"]
        return (
            ",".join(str(int(value)) for value in tile.values())
            if isinstance(tile, dict)
            else str(tile or "default")
        )

    timed = sorted((entry for entry in results if "us" in entry), key=lambda entry: entry["us"])
    chosen = [entry for entry in timed if not isinstance(entry["tile"], dict)]
    if timed:
        rate = next(name for name in ("TB/s", "TFLOP/s") if name in timed[0])
        shown = [*timed[:count], *(entry for entry in chosen if entry not in timed[:count])]
        print(
            f"{what}: "
            + "; ".join(
                f"{entry['us']} us {entry[rate]} {rate} ({brief(entry)})" for entry in shown
            ),
            flush=True,
        )
    for error in sorted({entry["failed"] for entry in results if "failed" in entry}):
        print(
            f"  failed: {error[:200]}: "
            f"{[brief(entry) for entry in results if entry.get('failed') == error][:4]}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--decodes", nargs="*", help="those alone, e.g. 1x32000")
    parser.add_argument("--compile-only", action="store_true", help="touch no GPU")
    parser.add_argument("--skip-checks", action="store_true")
    arguments = parser.parse_args()
    began = time.monotonic()
    # Forked before CUDA starts here: a child shares neither a context nor the GPU.
    pool = ProcessPoolExecutor(arguments.jobs, mp_context=multiprocessing.get_context("fork"))
    jobs: dict[object, Future[None]] = {}
    if not arguments.skip_checks:
        jobs |= {
            name: pool.submit(compile_geometry, name)
            for name in sorted(GEOMETRIES, key=lambda name: -GEOMETRIES[name][0]["head_dim"])
        }
    defaults = {
        (batch, context): triton_paged.decode_tile(batch * KV_HEADS, context, HEAD_DIM, 2)
        for batch, context in DECODES
    }
    in_fp8 = ((1, 32000), (8, 16000), (64, 4000), (256, 640))
    kinds = [*((pair, None) for pair in DECODES), *((pair, FP8) for pair in in_fp8)]
    if arguments.decodes:
        kinds = [(pair, kv) for pair, kv in kinds if "x".join(map(str, pair)) in arguments.decodes]
    for tile in [] if arguments.decodes else PREFILL_TILES:
        jobs.setdefault(tile, pool.submit(compile_prefill, tile))
    for pair, kv in kinds:
        for tile in [*decode_candidates(*pair), defaults[pair]]:
            key = (replace(tile, least=1), kv)
            if key not in jobs:
                jobs[key] = pool.submit(compile_decode, tile, kv)
    print(f"{len(jobs)} to compile", flush=True)

    def out_of_time() -> bool:
        return time.monotonic() - began > arguments.seconds

    wrong: list[str] = []
    results: list[dict] = []
    if arguments.compile_only:
        for key, job in jobs.items():
            if error := job.exception():
                print(f"  {key}: does not compile, {error!r}"[:300])
        print(f"compiled after {time.monotonic() - began:.0f} s")
        return
    if not arguments.skip_checks:
        for name in GEOMETRIES:
            if error := jobs[name].exception():
                print(f"  {name}: does not compile, {error!r}"[:300], flush=True)
            if not out_of_time():
                try:
                    wrong += check(name)
                except Exception as error:
                    wrong.append(f"{name}: {type(error).__name__} {error}"[:400])
                    print(f"  WRONG {wrong[-1]}", flush=True)
        wrong += check_graph()
        print(
            f"checked after {time.monotonic() - began:.0f} s: "
            + (f"{len(wrong)} WRONG" if wrong else "all right"),
            flush=True,
        )
    for job in jobs.values():
        job.exception()
    print(f"compiled after {time.monotonic() - began:.0f} s", flush=True)
    for (batch, context), kv in kinds:
        found = time_decode(
            batch, context, kv, [None, *decode_candidates(batch, context)], out_of_time
        )
        show(f"decode {batch} x {context} {'fp8' if kv else 'bf16'}", found)
        results += found
    for chunks in () if arguments.decodes else ([(0, 2048)] * 4, [(1024, 1024)] * 8):
        found = time_prefill(chunks, [None, "write", *PREFILL_TILES], out_of_time)
        show(f"prefill {len(chunks)} x {chunks[0]}", found, 12)
        results += found
    Path(os.environ.get("OUT", "/tmp"), "attention.json").write_text(
        json.dumps({"wrong": wrong, "results": results})
    )
    pool.shutdown(wait=False, cancel_futures=True)
    print(f"done after {time.monotonic() - began:.0f} s", flush=True)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
