"""Find the best `Tile` of our Triton matmuls on this GPU, for each shape of a Llama-3.1-8B layer
and each number of tokens.

``OUT=dir python tests/benchmarks/sweep.py --seconds 240``: candidates compile in parallel, by
processes that do not touch the GPU; each is checked against the plain result and then timed,
weights rotating past the L2 cache, in a CUDA graph. The most valuable come first; what was found is
written after each group, sweep.json: ``best`` by kernel, tokens and shape, and ``all``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import traceback
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (0, 1, 2)]
from gemm import SHAPES, microseconds, spec_of, weight_of  # noqa: E402

from qtool.runtime.kernels import load_kernel  # noqa: E402
from qtool.runtime.triton.tiles import Tile, shape_class  # noqa: E402
from qtool.scheme import SCHEMES  # noqa: E402
from qtool.weight import QuantizedWeight, dequantize, fake_quantize_input  # noqa: E402

TURNOVER = 200e6  # bytes of weights between two uses of one, well past the L2 cache
# name -> scheme, module; those of one module that follow take the best candidates of the first
CASES = {
    "int4": ("W4A16", "triton_weight_only"),
    "fp8": ("FP8_DYNAMIC", "triton_w8a8"),
    "int8": ("W8A8", "triton_w8a8"),
    "nvfp4": ("NVFP4A16", "triton_weight_only"),
    "mxfp4": ("MXFP4A16", "triton_weight_only"),
    "fp8_a16": ("FP8_W8A16", "triton_weight_only"),
    "int8_a16": ("W8A16_CHANNEL", "triton_weight_only"),
    "fp8_static": ("FP8", "triton_w8a8"),
    "int4_asym": ("W4A16_ASYM", "triton_weight_only"),
}
FIRST = ("int4", "fp8", "int8", "nvfp4")


def candidates(module: str, tokens: int) -> list[Tile]:
    """Return the tiles to try."""
    if module == "triton_weight_only":
        found = {
            1: [
                *(
                    Tile(64, 8, 256, programs, 4, stages)
                    for programs, stages in ((264, 6), (528, 4), (528, 6), (1056, 4))
                ),
                *(
                    Tile(32, 8, 256, programs, 2, stages)
                    for programs, stages in ((528, 6), (1056, 4), (2112, 3))
                ),
                *(
                    Tile(32, 8, 512, programs, 2, stages)
                    for programs, stages in ((528, 4), (1056, 3))
                ),
                *(
                    Tile(64, 8, 256, programs, 2, stages)
                    for programs, stages in ((528, 4), (1056, 4))
                ),
                *(
                    Tile(128, 8, 256, programs, 4, stages)
                    for programs, stages in ((264, 5), (528, 3))
                ),
                Tile(64, 8, 512, 528, 4, 3),
                Tile(64, 8, 512, 528, 2, 3),
                Tile(64, 8, 256, 1056, 2, 3),
                Tile(128, 8, 256, 264, 4, 4),
                Tile(16, 8, 512, 2112, 1, 4),
                Tile(64, 16, 256, 528, 4, 4),
                *(
                    replace(tile, pdl=True)
                    for tile in (
                        Tile(64, 8, 256, 528, 4, 4),
                        Tile(32, 8, 256, 1056, 2, 4),
                        Tile(64, 8, 256, 1056, 4, 4),
                    )
                ),
            ],
            16: [
                *(
                    Tile(64, 16, 256, programs, 4, stages)
                    for programs, stages in ((264, 5), (528, 4), (528, 3), (1056, 3))
                ),
                *(
                    Tile(32, 16, 256, programs, 2, stages)
                    for programs, stages in ((528, 4), (1056, 4))
                ),
                *(
                    Tile(64, 16, 256, programs, 2, stages)
                    for programs, stages in ((528, 4), (1056, 3))
                ),
                *(
                    Tile(128, 16, 256, programs, 4, stages)
                    for programs, stages in ((264, 4), (528, 3))
                ),
                Tile(128, 16, 256, 264, 8, 4),
                Tile(128, 16, 512, 264, 4, 3),
                Tile(64, 16, 512, 528, 2, 3),
                Tile(32, 16, 256, 528, 4, 4),
                *(
                    replace(tile, pdl=True)
                    for tile in (Tile(64, 16, 256, 528, 4, 4), Tile(32, 16, 256, 1056, 2, 4))
                ),
            ],
            64: [
                *(
                    Tile(64, 64, 256, programs, 4, stages)
                    for programs, stages in ((132, 4), (264, 3), (528, 3))
                ),
                *(
                    Tile(128, 64, 256, programs, warps, 3)
                    for programs, warps in ((132, 4), (264, 4), (132, 8), (264, 8))
                ),
                *(
                    Tile(256, 64, 256, programs, 8, stages)
                    for programs, stages in ((132, 3), (264, 2), (264, 3))
                ),
                *(Tile(128, 32, 256, programs, 4, 3) for programs in (264, 528)),
                Tile(128, 64, 256, 264, 8, 3, pdl=True),
            ],
            256: [
                *(Tile(128, 128, 256, programs, 8, 2) for programs in (0, 132, 264)),
                *(
                    Tile(128, 64, 256, programs, 4, stages)
                    for programs, stages in ((132, 3), (264, 2))
                ),
                *(Tile(128, 64, 256, programs, 8, 3) for programs in (132, 264)),
                *(
                    Tile(64, 128, 256, programs, 4, stages)
                    for programs, stages in ((132, 2), (264, 2))
                ),
                Tile(256, 128, 256, 132, 8, 2),
                Tile(256, 64, 256, 132, 8, 3),
            ],
            2048: [
                Tile(256, 128, 256, 0, 8, 2),
                Tile(128, 128, 256, 0, 8, 2),
                Tile(128, 128, 256, 0, 4, 2),
                Tile(256, 64, 256, 0, 8, 3),
                Tile(128, 256, 128, 0, 8, 2),
            ],
        }[tokens]
    else:
        found = {
            1: [
                *(
                    Tile(64, 8, 256, programs, 4, stages)
                    for programs, stages in ((264, 5), (528, 4), (396, 4))
                ),
                *(
                    Tile(64, 16, 256, programs, 4, stages)
                    for programs, stages in ((264, 5), (396, 4), (528, 4), (528, 3))
                ),
                *(
                    Tile(128, 16, 256, programs, warps, 4)
                    for programs, warps in ((264, 4), (264, 8))
                ),
                *(Tile(64, 16, 512, programs, 4, 3) for programs in (264, 396)),
                *(Tile(32, 8, 512, programs, 2, 4) for programs in (528, 792)),
                Tile(64, 16, 128, 528, 4, 6),
            ],
            16: [
                *(
                    Tile(64, 16, 256, programs, 4, stages)
                    for programs, stages in ((264, 5), (396, 4), (528, 4), (528, 3))
                ),
                *(
                    Tile(128, 16, 256, programs, warps, stages)
                    for programs, warps, stages in ((264, 4, 4), (264, 8, 4), (132, 4, 5))
                ),
                Tile(64, 16, 512, 264, 4, 3),
                Tile(64, 16, 128, 528, 4, 6),
            ],
            64: [
                *(
                    Tile(64, 64, 256, programs, 4, stages)
                    for programs, stages in ((132, 5), (264, 3), (396, 3))
                ),
                *(
                    Tile(64, 64, 128, programs, 4, stages)
                    for programs, stages in ((264, 6), (528, 4))
                ),
                *(
                    Tile(128, 64, 128, programs, warps, 5)
                    for programs, warps in ((132, 4), (264, 4), (264, 8))
                ),
                Tile(128, 64, 256, 132, 4, 4),
            ],
            256: [
                *(
                    Tile(128, 128, 128, programs, warps, stages)
                    for programs, warps, stages in ((132, 8, 5), (264, 8, 3), (264, 4, 3))
                ),
                *(Tile(64, 128, 128, programs, 4, 4) for programs in (132, 264)),
                *(Tile(128, 256, 128, programs, 8, 4) for programs in (0, 132)),
                *(Tile(64, 256, 128, programs, 4, 4) for programs in (0, 132)),
                Tile(128, 64, 128, 264, 4, 4),
                *(Tile(128, 128, 128, 132, 8, stages, bulk=True) for stages in (6, 4)),
                Tile(256, 128, 128, 132, 8, 4, bulk=True),
                Tile(128, 256, 128, 132, 8, 4, bulk=True),
            ],
            2048: [
                *(Tile(256, 128, 128, 132, 8, stages, bulk=True) for stages in (4, 3)),
                *(Tile(128, 256, 128, 132, 8, stages, bulk=True) for stages in (4, 3)),
                *(Tile(256, 128, 64, 132, 8, stages, bulk=True) for stages in (8, 6)),
                Tile(128, 256, 64, 132, 8, 8, bulk=True),
                *(Tile(128, 128, 128, 132, 8, stages, bulk=True) for stages in (6, 5)),
                *(Tile(128, 256, 128, 0, 8, stages) for stages in (3, 4)),
                Tile(128, 128, 128, 0, 8, 5),
            ],
        }[tokens]
        most = len(found) if tokens <= 16 else 4
        found = [*found, *(replace(tile, pdl=True) for tile in found[:most] if not tile.bulk)]
    return list(dict.fromkeys(found))


@dataclass
class Layers:
    """Copies of one weight, the dequantized one, and how to call the kernel on them."""

    name: str
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        scheme, module = CASES[self.name]
        self.spec = spec_of(SCHEMES[scheme], *self.shape)
        self.module: ModuleType = load_kernel(module)  # type: ignore[assignment]
        self.weight: QuantizedWeight = weight_of(SCHEMES[scheme], *self.shape)
        packed = self.module.pack(self.spec, self.weight)
        size = sum(tensor.numel() * tensor.element_size() for tensor in packed.values())
        copies = max(3, -(-int(TURNOVER) // size))
        self.packed = [
            packed,
            *({name: tensor.clone() for name, tensor in packed.items()} for _ in range(copies - 1)),
        ]

    def expected(self, x: Tensor) -> Tensor:
        inputs = self.spec.scheme.activations
        static = self.weight.activation.scale if self.weight.activation else None
        rounded = fake_quantize_input(x.float(), inputs, static) if inputs else x.float()
        return rounded @ dequantize(self.weight).t()

    def try_tile(self, tile: Tile, x: Tensor, expected: Tensor) -> float:
        """Return the microseconds of one launch; ValueError when the result is wrong or changes."""
        result = self.module.multiply(self.spec, x, self.packed[0], None, tile)
        error = float((result.float() - expected).norm() / expected.norm())
        if not error < 1e-2:
            raise ValueError(f"relative error {error:.4f}")
        again = self.module.multiply(self.spec, x, self.packed[0], None, tile)
        if not torch.equal(result, again):
            raise ValueError("two runs differ")
        return microseconds(
            lambda: [
                self.module.multiply(self.spec, x, packed, None, tile) for packed in self.packed
            ],
            replays=7,
        ) / len(self.packed)


def compile_candidate(name: str, tokens: int, tile: Tile) -> None:
    """Compile, in a process without a GPU, for all four shapes."""
    from support import triton_cpu

    triton_cpu.compile_only([])
    scheme, module = CASES[name]
    for shape in SHAPES:
        spec = spec_of(SCHEMES[scheme], *shape)
        packed = triton_cpu.empty_packed(module, spec)
        try:
            load_kernel(module).multiply(
                spec,
                torch.empty(tokens, shape[1], dtype=torch.bfloat16, device="meta"),
                packed,
                None,
                tile,
            )  # type: ignore[attr-defined]
        except Exception as error:
            print(f"  {name} M={tokens} {tile}: does not compile, {error!r}"[:300], flush=True)
            break


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--kernels", default=",".join(CASES))
    parser.add_argument("--tokens", default="1,16,64,256,2048")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--compile-only", action="store_true", help="touch no GPU")
    arguments = parser.parse_args()
    began = time.monotonic()
    names, all_tokens = (
        arguments.kernels.split(","),
        [int(count) for count in arguments.tokens.split(",")],
    )
    order = [(name, tokens) for tokens in all_tokens for name in names if name in FIRST]
    order += [(name, tokens) for tokens in all_tokens for name in names if name not in FIRST]
    # Forked before CUDA starts here: a child shares neither a context nor the GPU.
    pool = ProcessPoolExecutor(arguments.jobs, mp_context=multiprocessing.get_context("fork"))
    waiting: dict[tuple[str, int], list[Future[None]]] = {
        (name, tokens): [
            pool.submit(compile_candidate, name, tokens, tile)
            for tile in candidates(CASES[name][1], tokens)
        ]
        for name, tokens in order
    }
    results: list[dict] = []
    layers: dict[tuple[str, tuple[int, int]], Layers] = {}
    for name, tokens in order:
        if time.monotonic() - began > arguments.seconds:
            print(f"out of time before {name} M={tokens}", flush=True)
            break
        # those compile when they are tried
        lost = [error for future in waiting[name, tokens] if (error := future.exception())]
        print(
            f"{name} M={tokens}: compiled after {time.monotonic() - began:.0f} s"
            + (f", not {len(lost)}: {lost[0]!r}" if lost else ""),
            flush=True,
        )
        if arguments.compile_only:
            continue
        for shape in SHAPES:
            key = (name, shape)
            if key not in layers:
                layers[key] = Layers(name, shape)
            x = torch.randn(tokens, shape[1], device="cuda", dtype=torch.bfloat16)
            expected = layers[key].expected(x)
            for tile in candidates(CASES[name][1], tokens):
                entry = {"kernel": name, "tokens": tokens, "shape": shape, "tile": asdict(tile)}
                try:
                    entry["us"] = round(layers[key].try_tile(tile, x, expected), 2)
                except Exception as error:
                    entry["failed"] = f"{type(error).__name__}: {error}"[:300]
                    if "CUDA error" in str(error):
                        write(results)
                        traceback.print_exc()
                        sys.exit(f"the GPU is lost to {name} M={tokens} {shape} {tile}")
                results.append(entry)
        report(results, name, tokens)
        write(results)
    pool.shutdown(wait=False, cancel_futures=True)


def report(results: list[dict], name: str, tokens: int) -> None:
    """Print what was found for one kernel and number of tokens: the sum of the best, and the
    entries of the table.
    """
    here = [entry for entry in results if (entry["kernel"], entry["tokens"]) == (name, tokens)]
    for error in sorted({entry["failed"] for entry in here if "failed" in entry}):
        tiles = {tuple(entry["tile"].values()) for entry in here if entry.get("failed") == error}
        print(f"  failed: {error[:150]}: {sorted(tiles)[:3]}", flush=True)
    timed = [entry for entry in here if "us" in entry]
    total = 0.0
    for shape in SHAPES:
        ranked = sorted(
            (entry for entry in timed if entry["shape"] == shape), key=lambda entry: entry["us"]
        )
        if ranked:
            total += ranked[0]["us"]
            print(
                f"  {shape}: "
                + ", ".join(
                    f"{entry['us']} {tuple(entry['tile'].values())}" for entry in ranked[:3]
                ),
                flush=True,
            )
    print(f"  sum of the best: {total:.1f} us", flush=True)
    for group in ("small", "deep", "wide"):
        shapes = [shape for shape in SHAPES if shape_class(*shape) == group]
        sums: dict[tuple, float] = {}
        for tile in {tuple(entry["tile"].values()) for entry in timed}:
            times = [
                entry["us"]
                for entry in timed
                if entry["shape"] in shapes and tuple(entry["tile"].values()) == tile
            ]
            if shapes and len(times) == len(shapes):
                sums[tile] = sum(times)
        if sums:
            best = min(sums, key=lambda tile: sums[tile])
            print(f'    ({tokens}, "{group}"): Tile{best},  # {sums[best]:.1f} us', flush=True)


def write(results: list[dict]) -> None:
    best: dict = {}
    for entry in results:
        place = best.setdefault(entry["kernel"], {}).setdefault(entry["tokens"], {})
        shape = "x".join(map(str, entry["shape"]))
        if "us" in entry and entry["us"] < place.get(shape, {"us": float("inf")})["us"]:
            place[shape] = {"us": entry["us"], "tile": entry["tile"]}
    Path(os.environ.get("OUT", "/tmp"), "sweep.json").write_text(
        json.dumps({"best": best, "all": results})
    )


if __name__ == "__main__":
    with torch.inference_mode():
        main()
