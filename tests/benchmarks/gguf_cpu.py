"""Time llama.cpp (through xllamacpp) and qtool's engine on the same GGUF files, on a CPU: a token at
batch 1, and a prompt of 512.

    python tests/benchmarks/gguf_cpu.py WORK [--types Q4_0 Q8_0] [--threads 2] [--repeats 3]
        [--cpu-time]

The model has the shape of TinyLlama 1.1B and random weights; it is written to WORK once. Each
engine runs in a process of its own, in turns, with as many threads; the best of the repeats counts.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}
PROMPT = 512
ANSWER = 64
SHORT_PROMPT = 16


def write_files(work: Path, types: list[str]) -> dict[str, Path]:
    """Return the GGUF file of each type, written if it is not there."""
    from random_model import write_model
    from transformers import LlamaConfig

    from qtool.conversion import export

    source = work / "random-1b"
    if not source.exists():
        config = LlamaConfig(**SHAPE, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False)
        write_model(source, config, Path("examples/tiny-python-llama"))
    files = {}
    for name in types:
        folder = work / f"random-1b-{name}"
        if not folder.exists():
            export(source, to="gguf", type=name, output=folder)
        files[name] = folder / f"{folder.name}.gguf"
    return files


def prompt(size: int) -> list[int]:
    return [random.randrange(5, 4000) for _ in range(size)]


class Clock:
    """Seconds that have passed, or with ``of_cpu`` those that this process has computed."""

    def __init__(self, *, of_cpu: bool) -> None:
        self.now = time.process_time if of_cpu else time.perf_counter

    def seconds(self, work: Callable[[], object]) -> float:
        start = self.now()
        work()
        return self.now() - start


def measures(run: Callable[[int, int], object], clock: Clock, repeats: int) -> dict[str, float]:
    """Return tokens a second; ``run`` answers a prompt of some tokens with some tokens."""

    def seconds(size: int, answer: int) -> float:
        return clock.seconds(lambda: run(size, answer))

    seconds(SHORT_PROMPT, 4)
    decode, prefill = [], []
    for _ in range(repeats):
        long, short = seconds(SHORT_PROMPT, ANSWER), seconds(SHORT_PROMPT, 1)
        decode.append((ANSWER - 1) / (long - short))
        prefill.append(PROMPT / seconds(PROMPT, 1))
    return {"decode_tokens_s": max(decode), "prompt_tokens_s": max(prefill)}


def time_llama_cpp(path: str, threads: int, clock: Clock, repeats: int) -> dict[str, float]:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = path
    parameters.n_ctx = 1024
    parameters.n_parallel = 1
    parameters.cpuparams.n_threads = threads
    parameters.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(parameters)

    def run(size: int, answer: int) -> object:
        request = {
            "prompt": prompt(size),
            "n_predict": answer,
            "temperature": -1,
            "ignore_eos": True,
            "cache_prompt": False,
        }
        return server.handle_completions(request)

    return measures(run, clock, repeats)


def time_qtool(path: str, threads: int, clock: Clock, repeats: int) -> dict[str, float]:
    import torch

    from qtool.engine.engine import Engine

    torch.set_num_threads(threads)
    engine = Engine(
        model_path=path,
        device="cpu",
        disable_radix_cache=True,
        context_length=1024,
        skip_tokenizer_init=True,
    )

    def run(size: int, answer: int) -> object:
        sampling = {"temperature": 0, "max_new_tokens": answer, "ignore_eos": True}
        return engine.generate(input_ids=[prompt(size)], sampling_params=sampling)

    return measures(run, clock, repeats)


SIDES = {"llama.cpp": time_llama_cpp, "qtool": time_qtool}


def measured(side: str, path: Path, options: list[str]) -> dict[str, float]:
    """Return what ``side`` reaches, in a process of its own."""
    command = [sys.executable, __file__, str(path), "--side", side, *options]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Print a row for each type."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--types", nargs="+", default=["Q4_0", "Q8_0"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="tokens a second of CPU time, on one thread: for a machine that others use",
    )
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    random.seed(0)
    if args.side:
        clock = Clock(of_cpu=args.cpu_time)
        print(json.dumps(SIDES[args.side](str(args.work), args.threads, clock, args.repeats)))
        return
    options = ["--threads", "1" if args.cpu_time else str(args.threads)]
    options += ["--repeats", str(args.repeats), *(["--cpu-time"] if args.cpu_time else [])]
    for name, path in write_files(args.work, args.types).items():
        theirs, ours = (measured(side, path, options) for side in SIDES)
        for measure, value in theirs.items():
            print(
                f"{name} {measure}: llama.cpp {value:.1f}, qtool {ours[measure]:.1f}, "
                f"ratio {ours[measure] / value:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
