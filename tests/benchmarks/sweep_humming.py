"""Find schedules for humming that are faster than the ones it chooses, for each shape of a
Llama-3.1-8B layer and each number of tokens.

``OUT=dir python tests/benchmarks/sweep_humming.py --seconds 180``: candidates around humming's
choice, as far as its own rules allow them, compile in parallel; each is checked against humming's
choice and then timed, weights rotating past the L2 cache, in a CUDA graph. The most valuable come
first. ``$OUT`` gets sweep_humming.json, with all times, and humming_schedules.json, to be kept in
qtool/runtime/kernels/.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (0, 2)]
from gemm import SHAPES, microseconds, spec_of, weight_of  # noqa: E402

from qtool.runtime.kernels import LinearSpec, device_of, humming  # noqa: E402
from qtool.runtime.triton.tiles import shape_class  # noqa: E402
from qtool.scheme import SCHEMES  # noqa: E402

TURNOVER = 200e6  # bytes of weights between two uses of one, well past the L2 cache
GAIN = 0.03  # a schedule must be this much faster to be kept
LIMIT = 1e-2  # relative difference from the result of humming's choice
ORDER = tuple(
    (name, tokens)
    for tokens, names in ((64, ("W4A16", "NVFP4A16")), (256, ("W4A16", "NVFP4A16")))
    for name in names
)
ORDER += (("NVFP4A16", 16), ("NVFP4A16", 1), ("W4A16", 2048), ("NVFP4A16", 2048))
# measured tokens -> more than, up to; as in `humming.STEPS`
RANGES = {
    1: (0, 8),
    16: (8, 16),
    64: (32, 64),
    256: (192, 256),
    2048: (512, 1 << 30),
}
# humming has it for experts alone
OVERLAP = {
    "wgmma_split_issue_wait": True,
    "smem_reuse_mode": "none",
    "producer_stage_unroll": 1,
}
UNKNOWN = ("multi_cast_size_b", "use_pdl", "evict_weights_first")  # to `analyze_candidate`
Schedule = dict[str, Any]


def variants(tokens: int) -> Iterator[Schedule]:
    """Yield what to change in humming's choice, the most promising first."""

    def tile(
        m: int, n: int, k: int, warp_n: int, warp_k: int, stages: int, blocks: int, **more: object
    ) -> Schedule:
        shapes = {"block_shape": (m, n, k), "warp_shape": (m, warp_n, warp_k)}
        return {
            **shapes,
            "num_stages": stages,
            "num_ctas_per_sm": blocks,
            "multi_cast_size_a": 1,
            **more,
        }

    if tokens <= 16:
        m = 8 if tokens <= 8 else 16
        yield {"num_ctas_per_sm": 2}
        yield {"num_stages": 6}
        yield {"num_ctas_per_sm": 2, "num_stages": 6}
        yield tile(m, 128, 256, 64, 32, 3, 1)
        yield tile(m, 128, 64, 64, 32, 6, 3)
        yield tile(m, 64, 256, 64, 32, 4, 1)
        yield tile(m, 64, 128, 64, 32, 6, 3)
        yield tile(m, 256, 64, 64, 32, 4, 1)
        yield {"num_ctas_per_sm": 2, "use_tma": True}
        yield tile(m, 128, 128, 32, 64, 4, 2)
        yield tile(m, 128, 128, 32, 64, 4, 2, mma_type="wgmma", use_tma=True, use_warp_spec=True)
    elif tokens <= 64:
        yield OVERLAP
        yield {"num_stages": 6}
        yield OVERLAP | {"num_stages": 6}
        yield {"multi_cast_size_a": 2}
        yield tile(tokens, 256, 64, 32, 64, 5, 1)
        yield tile(tokens, 256, 64, 32, 64, 5, 1, **OVERLAP)
        yield tile(tokens, 256, 64, 32, 64, 8, 1, **OVERLAP)
        yield tile(tokens, 128, 128, 32, 64, 5, 1)
        yield tile(tokens, 256, 64, 64, 64, 4, 2)
        yield tile(tokens, 256, 64, 64, 64, 4, 2, **OVERLAP)
        yield tile(tokens, 128, 64, 32, 64, 4, 3)
        yield {"evict_weights_first": True}
        yield {"use_stream_k": False}
    elif tokens <= 256:
        yield OVERLAP
        yield tile(128, 256, 64, 32, 64, 4, 1, multi_cast_size_b=2)
        yield tile(128, 256, 64, 32, 64, 4, 1, multi_cast_size_a=2)
        yield tile(128, 256, 64, 32, 64, 4, 1, multi_cast_size_a=2, **OVERLAP)
        yield tile(128, 128, 64, 32, 64, 4, 2)
        yield tile(128, 128, 64, 32, 64, 4, 2, **OVERLAP)
        yield tile(64, 256, 64, 32, 64, 5, 1, **OVERLAP)
        yield tile(88, 256, 64, 32, 64, 4, 1, **OVERLAP)
        yield {"use_stream_k": False}
    else:
        # with 176 rows, humming's choice, many registers spill
        yield tile(152, 256, 64, 32, 64, 4, 1, multi_cast_size_a=2, **OVERLAP)
        yield tile(128, 256, 64, 32, 64, 4, 1, multi_cast_size_a=2)
        yield tile(128, 256, 64, 32, 64, 4, 1, multi_cast_size_a=2, **OVERLAP)
        yield tile(128, 256, 64, 32, 64, 4, 1, multi_cast_size_b=2, **OVERLAP)
        yield {"multi_cast_size_a": 1, "multi_cast_size_b": 2}
        yield {"use_stream_k": False}
        yield {"raster_group_m": 8}
        yield tile(176, 128, 64, 32, 64, 4, 2, multi_cast_size_a=2)
        yield tile(128, 128, 64, 32, 64, 4, 2, multi_cast_size_a=2)


def candidates(config: Any, tokens: int, device: torch.device) -> list[Schedule]:
    """Return humming's choice and what can be tried instead: what its checks let pass, with stages
    and blocks as its rules fit them.
    """
    from humming.config import GemmType
    from humming.tune import get_heuristics_config
    from humming.tune.candidate import (
        DeviceProfile,
        ScheduleCandidate,
        TuningProblem,
        analyze_candidate,
    )
    from humming.tune.sm90_policies import fit_sm90_tile

    properties = torch.cuda.get_device_properties(device)
    profile = DeviceProfile("sm90", 90, properties.multi_processor_count, 227 * 1024)
    problem = TuningProblem(config, tokens, GemmType.DENSE, profile)
    options = humming.launch_options(
        tokens, input_bits=config.a_dtype.num_bits, capability=profile.sm_version
    )
    chosen = (
        {"num_ctas_per_sm": 1, "multi_cast_size_a": 1}
        | get_heuristics_config(config, shape_m=tokens, device=device)
        | options
    )
    found = [chosen]
    for change in variants(tokens):
        schedule = chosen | change
        if schedule.get("mma_type") == "mma" and schedule.get("use_warp_spec"):
            continue
        fitted = schedule
        try:
            fitted = fit_sm90_tile(config, schedule)
            known = {name: value for name, value in fitted.items() if name not in UNKNOWN}
            reasons = analyze_candidate(
                problem, ScheduleCandidate.from_config("candidate", known)
            ).rejection_reasons
        except (ValueError, AssertionError) as error:
            reasons = (f"{type(error).__name__}: {error}",)
        if fitted["block_shape"] != schedule["block_shape"]:
            reasons = (*reasons, f"humming would make the tile {fitted['block_shape']}")
        if reasons:
            print(f"  not {json.dumps(change)}: {reasons[0]}"[:200], flush=True)
        elif fitted not in found:
            found.append(fitted)
    return found


class Layers:
    """Copies of one weight."""

    def __init__(self, spec: LinearSpec) -> None:
        self.spec, self.device = spec, torch.device("cuda", torch.cuda.current_device())
        packed = humming.lay_out(spec, weight_of(spec.scheme, *spec.shape))
        self.config = humming._config(spec, self.device, "weight_scale_2" in packed)[0]
        size = sum(tensor.numel() * tensor.element_size() for tensor in packed.values())
        self.packed = [
            {name: tensor.clone() for name, tensor in packed.items()}
            for _ in range(max(3, -(-int(TURNOVER) // size)))
        ]

    def multiply(self, x: Tensor, packed: dict[str, Tensor], schedule: str) -> Tensor:
        from humming.forward import humming_forward

        return humming_forward(self.config, x, tuning_config=schedule, **packed)

    def try_schedule(
        self, schedule: str, x: Tensor, expected: Tensor | None
    ) -> tuple[float, Tensor]:
        """Return the microseconds of one launch, and the result; ValueError when that is wrong."""
        for _ in range(2):  # the second finds the locks as the first has left them
            result = self.multiply(x, self.packed[0], schedule).clone()
            expected = result if expected is None else expected
            error = float((result.float() - expected.float()).norm() / expected.float().norm())
            if not error < LIMIT:
                raise ValueError(f"relative difference {error:.4f}")
        return microseconds(
            lambda: [self.multiply(x, packed, schedule) for packed in self.packed]
        ) / len(self.packed), result


def main() -> None:
    from humming.kernel.humming import HummingKernel

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--seconds", type=float, default=180, help="nothing is begun after this long"
    )
    parser.add_argument("--schemes", default="W4A16,NVFP4A16")
    parser.add_argument("--tokens", default="1,16,64,256,2048")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    began = time.monotonic()
    wanted = [int(count) for count in arguments.tokens.split(",")]
    order = [
        (name, tokens)
        for name, tokens in ORDER
        if tokens in wanted and name in arguments.schemes.split(",")
    ]
    layers = {
        (name, shape): Layers(spec_of(SCHEMES[name], *shape))
        for name in dict(order)
        for shape in SHAPES
    }
    device = next(iter(layers.values())).device

    pool = ThreadPoolExecutor(arguments.jobs)  # each compiles in a process that humming starts
    compiled: dict[tuple[str, str], Future[Tensor]] = {}
    waiting: dict[tuple[str, int, tuple[int, int]], list[tuple[Schedule, Future[Tensor]]]] = {}
    for name, tokens in order:
        for shape in SHAPES:
            config = layers[name, shape].config
            here: list[tuple[Schedule, Future[Tensor]]] = []
            for schedule in candidates(config, tokens, device):
                key = config.to_str(), text_of(schedule)
                if key not in compiled:  # humming must not compile one kernel in two threads
                    compiled[key] = pool.submit(
                        HummingKernel.prepare_kernels, key[0], None, key[1], device
                    )
                here.append((schedule, compiled[key]))
            waiting[name, tokens, shape] = here
    print(f"{len(compiled)} kernels to compile, after {time.monotonic() - began:.0f} s", flush=True)

    results: list[dict[str, Any]] = []
    for (name, tokens, shape), schedules in waiting.items():
        x = torch.randn(tokens, shape[1], device="cuda", dtype=torch.bfloat16)
        expected = None
        tried: list[dict[str, Any]] = []
        for schedule, future in schedules:
            entry: dict[str, Any] = {
                "scheme": name,
                "tokens": tokens,
                "shape": shape,
                "schedule": schedule,
            }
            try:
                future.result(timeout=max(0.0, began + arguments.seconds - time.monotonic()))
                us, result = layers[name, shape].try_schedule(text_of(schedule), x, expected)
                entry["us"] = round(us, 2)
                expected = result if expected is None else expected
            except Exception as error:
                entry["failed"] = f"{type(error).__name__}: {error}"[:300]
                if schedule is schedules[0][0]:
                    break  # nothing to compare with
                if "CUDA error" in str(error):
                    write(results + tried)
                    sys.exit(f"the GPU is lost to {name} M={tokens} {shape} {schedule}: {error}")
            finally:
                tried.append(entry)
        results += tried
        report(name, tokens, shape, tried, time.monotonic() - began)
        write(results)
    pool.shutdown(wait=False, cancel_futures=True)


def text_of(schedule: Schedule) -> str:
    return json.dumps(schedule, sort_keys=True)


def report(
    name: str, tokens: int, shape: tuple[int, int], here: list[dict[str, Any]], seconds: float
) -> None:
    timed = sorted((entry for entry in here if "us" in entry), key=lambda entry: entry["us"])
    if not timed:
        print(f"{name} M={tokens} {shape}: {here[0]['failed']}", flush=True)
        return
    print(
        f"{name} M={tokens} {shape}: humming's {here[0]['us']} us, best {timed[0]['us']} us, "
        f"after {seconds:.0f} s",
        flush=True,
    )
    for entry in timed[:3]:
        print(
            f"  {entry['us']} us {json.dumps(changes(here[0]['schedule'], entry['schedule']))}",
            flush=True,
        )
    for entry in here:
        if "failed" in entry:
            print(
                f"  failed {json.dumps(changes(here[0]['schedule'], entry['schedule']))}: "
                f"{entry['failed'][:150]}",
                flush=True,
            )


def changes(chosen: Schedule, schedule: Schedule) -> Schedule:
    return {name: value for name, value in schedule.items() if chosen.get(name) != value}


def write(results: list[dict[str, Any]]) -> None:
    """Write the times, and the table: for each kind of shape the schedule with the least sum of
    times, where that gains enough.
    """
    folder = Path(os.environ.get("OUT", "/tmp"))
    (folder / "sweep_humming.json").write_text(json.dumps(results))
    table = []
    for name, tokens, kind in dict.fromkeys(
        (entry["scheme"], entry["tokens"], shape_class(*entry["shape"])) for entry in results
    ):
        by_shape: dict[tuple[int, int], list[dict[str, Any]]] = {}
        for entry in results:
            if (entry["scheme"], entry["tokens"], shape_class(*entry["shape"])) == (
                name,
                tokens,
                kind,
            ):
                by_shape.setdefault(entry["shape"], []).append(entry)
        sums: dict[str, float] = {}
        chosen = sum(entries[0].get("us", float("nan")) for entries in by_shape.values())
        for entry in next(iter(by_shape.values())):
            times = [
                other["us"]
                for entries in by_shape.values()
                for other in entries
                if other["schedule"] == entry["schedule"] and "us" in other
            ]
            if len(times) == len(by_shape):
                sums[text_of(entry["schedule"])] = sum(times)
        best = min(sums, key=lambda schedule: sums[schedule], default=None)
        if best and sums[best] < (1 - GAIN) * chosen:
            above, up_to = RANGES[tokens]
            entry = {
                "weights": str(SCHEMES[name].weights),
                "kind": kind,
                "above": above,
                "up_to": up_to,
            }
            table.append(
                entry
                | {
                    "us": round(sums[best], 2),
                    "humming_us": round(chosen, 2),
                    "schedule": json.loads(best),
                }
            )
    device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    header = {
        "device": str(device_of(device)),
        "multiprocessors": properties.multi_processor_count,
        "gpu": properties.name,
    }
    rows = ",\n".join(f"  {json.dumps(entry)}" for entry in table)
    (folder / "humming_schedules.json").write_text(
        f'{json.dumps(header)[:-1]}, "schedules": [\n{rows}\n]}}\n'
    )


if __name__ == "__main__":
    with torch.inference_mode():
        main()
