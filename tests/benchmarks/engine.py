"""Our engine's side of what `vllm_side.py` measures of vLLM: decode at batch 1, 16 and 64,
throughput, prefill; an 8B shape, or one of `model_shapes`, such as ``--shape moe``, Qwen3-30B-A3B's
cut to 12 layers; random weights.

    OUT=dir python tests/benchmarks/engine.py bf16 fp8 w4a16 [--shape moe] [--quick] [--profile]
    [--set max_running_requests=64 ...]

``--repeats``: decode of answers that their drafts know, at batch 1 and 8, with and without them:
so many of 100 drafted tokens are right; with ``--set 'speculative_algorithm="NGRAM"'``.
``--mtp 3 --shape qwen3_5_moe``: decode at batch 1, 8 and 64 without drafts, and with three that the
checkpoint's own layer makes, in CUDA graphs and launch by launch; ``--repeats`` (80) of 100 that
are right stay so.
``--contexts 1x32000 8x16000``: decode after one prompt of 32 000 tokens, and after eight of 16 000.
``--profile``: also the kernels of some decode steps and of a prefill, by time. ``--quick``: without
throughput and prefill.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (0, 2)]
BEGAN = time.perf_counter()

import model_8b  # noqa: E402
import model_shapes  # noqa: E402

from qtool.engine.engine import Engine  # noqa: E402
from qtool.engine.scheduler import Propose  # noqa: E402
from qtool.engine.step import SequenceState  # noqa: E402

BENCHMARKED = {"skip_tokenizer_init": True, "disable_radix_cache": True}
IMPORTED = time.perf_counter()


def prompts(count: int, size: int) -> list[list[int]]:
    return [[random.randrange(5, 100_000) for _ in range(size)] for _ in range(count)]


def seconds(engine: Engine, asked: list[list[int]], tokens: int) -> float:
    """Return how long ``tokens`` greedy tokens after each of ``asked`` take."""
    start = time.perf_counter()
    results = engine.generate(
        input_ids=asked,
        sampling_params={"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True},
    )
    took = time.perf_counter() - start
    assert all(len(result["output_ids"]) == tokens for result in results)
    return took


def measure(engine: Engine, work: tuple[int, int], *, quick: bool) -> dict[str, float]:
    found: dict[str, float] = {}
    for batch, tokens in ((1, 256), (16, 128), (64, 128)):
        seconds(engine, prompts(batch, 128), 4)
        short = seconds(engine, prompts(batch, 128), 16)
        found[f"decode_ms_batch_{batch}"] = round(
            (seconds(engine, prompts(batch, 128), 16 + tokens) - short) / tokens * 1e3, 3
        )
    if not quick:
        count, new = work
        took = seconds(engine, prompts(count, 512), new)
        found[f"output_tokens_s_{count}x(512+{new})"] = round(count * new / took)
        found["prefill_tokens_s_64x2048"] = round(64 * 2048 / seconds(engine, prompts(64, 2048), 1))
    return found


def measure_contexts(engine: Engine, contexts: list[str], tokens: int = 128) -> dict[str, float]:
    """Return the time of a token after prompts of such sizes, e.g. ``8x16000``: eight of 16 000."""
    found: dict[str, float] = {}
    for context in contexts:
        batch, size = map(int, context.split("x"))
        asked = prompts(batch, size)
        short, long = (
            min(seconds(engine, asked, count) for _ in range(2)) for count in (16, 16 + tokens)
        )
        found[f"decode_ms_{context}"] = round((long - short) / tokens * 1e3, 3)
    return found


def measure_drafts(engine: Engine, percent: int, tokens: int = 256) -> dict[str, float]:
    """Return the time of a token with and without drafts, for requests whose answers are known
    from a run before; drafts are wrong by chance.
    """
    scheduler = engine.loop.scheduler
    search, total = scheduler.propose, engine.loop.spec.total
    params = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    found: dict[str, float] = {}
    for batch in (1, 8):
        asked = prompts(batch, 512)
        scheduler.propose = None
        results = engine.generate(input_ids=asked, sampling_params=params)
        known = [
            [*prompt, *result["output_ids"]] for prompt, result in zip(asked, results, strict=True)
        ]
        for name in ("plain", "drafts"):
            if name == "drafts":
                scheduler.propose = recalling(engine, search, known, percent)
            seconds(engine, asked, 16)
            steps, correct = total.steps, total.correct
            short = seconds(engine, asked, 16)
            took = seconds(engine, asked, tokens)
            found[f"{name}_ms_token_batch_{batch}"] = round((took - short) / (tokens - 16) * 1e3, 3)
        found[f"accept_length_batch_{batch}"] = round(
            1 + (total.correct - correct) / (total.steps - steps), 2
        )
    scheduler.propose = search
    return found


def recalling(engine: Engine, search: Propose, known: list[list[int]], percent: int) -> Propose:
    """Return what drafts the tokens of ``known``, ``percent`` of them right, after it has searched
    the request as ever, which takes time.
    """
    chance = random.Random(0)
    most = engine.loop.runner.limits.drafts

    def recall(sequence: SequenceState, room: int) -> list[int]:
        search(sequence, room)
        size = len(sequence.tokens)
        whole = next(each for each in known if each[: len(sequence.prompt)] == sequence.prompt)
        drafts = whole[size : size + min(room, most)]
        return [token if chance.random() * 100 < percent else token ^ 1 for token in drafts]

    return recall


def measure_mtp(
    folder: Path, chosen: dict[str, Any], steps: int, percent: int, tokens: int = 256
) -> dict[str, float]:
    """Return the time of a token without drafts and with ``steps`` drafts of the checkpoint's own
    layer, with and without the CUDA graphs that make them. Of 100 drafts ``percent`` stay what they
    are.
    """
    found: dict[str, float] = {}
    nextn = {"speculative_algorithm": "NEXTN", "speculative_num_steps": steps}
    for name, options in (("plain", {}), ("nextn", nextn)):
        with Engine(folder, **BENCHMARKED, context_length=4096, **options, **chosen) as engine:
            runner, spec = engine.loop.runner, engine.loop.spec
            print(f"{name}: {len(runner.graphs.decode)} graphs that decode", flush=True)
            if spec is not None:
                print(f"{len(runner._mtp.graphs)} graphs that draft", flush=True)
                search = engine.loop.scheduler.propose
                engine.loop.scheduler.propose = spoiling(search, percent)
            for way in (name,) if spec is None else (name, f"{name}_eager"):
                if way != name:
                    runner._mtp.graphs.clear()
                for batch in (1, 8, 64):
                    asked = prompts(batch, 128)
                    seconds(engine, asked, 16)
                    short = seconds(engine, asked, 16)
                    before = (spec.total.steps, spec.total.correct) if spec else (0, 0)
                    token_ms = (seconds(engine, asked, tokens) - short) / (tokens - 16) * 1e3
                    found[f"{way}_ms_token_batch_{batch}"] = round(token_ms, 3)
                    found[f"{way}_tokens_s_batch_{batch}"] = round(batch / token_ms * 1e3)
                    if spec is not None:
                        length = 1 + (spec.total.correct - before[1]) / (
                            spec.total.steps - before[0]
                        )
                        found[f"{way}_accept_length_batch_{batch}"] = round(length, 2)
                        found[f"{way}_ms_step_batch_{batch}"] = round(token_ms * length, 3)
    return found


def spoiling(search: Propose, percent: int) -> Propose:
    """Return what drafts as ``search`` does, and changes all but ``percent`` of 100 tokens."""
    chance = random.Random(0)

    def spoil(sequence: SequenceState, room: int) -> list[int]:
        drafts = search(sequence, room)
        return [token if chance.random() * 100 < percent else token ^ 1 for token in drafts]

    return spoil


def profile(engine: Engine, batch: int, size: int, tokens: int) -> list[str]:
    """Return where the time of ``batch`` requests goes, of ``size`` tokens and as many new ones:
    kernels by name, and how long the device is busy.

    Kernels that start early (PDL) count the time that they wait for the one before: durations
    overlap.
    """
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    asked = prompts(batch, size)
    with record(activities=[ProfilerActivity.CUDA]) as recorded:
        seconds(engine, asked, tokens)
        torch.cuda.synchronize()
    events = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in recorded.events()
        if event.device_type.name == "CUDA"
    )
    busy, end = 0.0, events[0][0]
    times: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for start, stop, name in events:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
        times[name[:80]] += stop - start
        counts[name[:80]] += 1
    whole = end - events[0][0]
    lines = [
        f"{batch} x ({size} + {tokens}): {whole / 1e3:.1f} ms, busy {busy / whole:.1%}, "
        f"{counts.total()} kernels"
    ]
    return lines + [
        f"  {time:9.1f} us {counts[name]:6d} x {time / counts[name]:7.2f}  {name}"
        for name, time in times.most_common(20)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kinds", nargs="+", choices=[*model_8b.QUANTIZED, "fp8_block"])
    parser.add_argument("--shape", choices=["8b", *model_shapes.SHAPES], default="8b")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/random_models"))
    parser.add_argument("--layers", type=int)
    parser.add_argument("--requests", type=int, default=512, help="of the throughput")
    parser.add_argument("--new", type=int, default=256, help="tokens of each")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--repeats", type=int, metavar="PERCENT", help="of drafts that are right")
    parser.add_argument("--mtp", type=int, metavar="STEPS", help="of the checkpoint's own layer")
    parser.add_argument("--contexts", nargs="+", help="e.g. 1x32000: decode after such prompts")
    parser.add_argument("--set", nargs="*", default=[], help="options of the engine, name=value")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    chosen: dict[str, Any] = {
        name: json.loads(value) for name, value in (item.split("=") for item in options.set)
    }
    print(f"imports {IMPORTED - BEGAN:.1f} s", flush=True)
    results = {}
    layers = options.layers or (
        32 if options.shape == "8b" else model_shapes.SHAPES[options.shape]().layers
    )
    for kind in options.kinds:
        folder = options.folder / f"{options.shape}-{kind}-{layers}{'-mtp' if options.mtp else ''}"
        if not (folder / "model.safetensors.index.json").exists():
            start = time.perf_counter()
            if options.shape == "8b":
                model_8b.write_checkpoint(folder, kind, layers=layers)
            else:
                mtp = options.mtp is not None
                model_shapes.write_checkpoint(folder, options.shape, kind, layers=layers, mtp=mtp)
            torch.cuda.empty_cache()
            print(f"{kind}: written in {time.perf_counter() - start:.1f} s", flush=True)
        random.seed(0)
        if options.mtp is not None:
            percent = 80 if options.repeats is None else options.repeats
            found = measure_mtp(folder, chosen, options.mtp, percent)
            print(f"RESULT qtool {kind} {json.dumps(found)}", flush=True)
            continue
        start = time.perf_counter()
        with Engine(
            folder,
            **BENCHMARKED,
            context_length=40960 if options.contexts else 4096,
            **chosen,
        ) as engine:
            ready = time.perf_counter()
            seconds(engine, prompts(1, 64), 1)
            found = {
                "start_s": round(ready - start, 1),
                "first_token_s": round(time.perf_counter() - start, 1),
            }
            found["cache_tokens"] = engine.loop.runner.page_count * 16
            print(f"{kind}: {found}", flush=True)
            if options.contexts:
                found |= measure_contexts(engine, options.contexts)
            elif options.repeats is None:
                found |= measure(engine, (options.requests, options.new), quick=options.quick)
            else:
                found |= measure_drafts(engine, options.repeats)
            results[kind] = found
            print(f"RESULT qtool {kind} {json.dumps(found)}", flush=True)
            if options.profile:
                for shape in ((1, 64, 41), (16, 128, 41), (8, 2048, 1)):
                    print("\n".join(profile(engine, *shape)), flush=True)
        Path(os.environ.get("OUT", "."), "engine.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
