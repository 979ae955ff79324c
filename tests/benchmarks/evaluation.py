"""How fast `qtool eval` is: perplexity and KL divergence of an 8B-shaped FP8 model over 100 000
tokens, beside the prefill rate of the engine; and whether ``--speed`` says what `engine.py` measures.

    OUT=dir python tests/benchmarks/evaluation.py [--folder /tmp/8b] [--tokens 100000] [--speed]

Random weights, and token ids drawn at random: only the shape matters.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (0, 2)]

from engine import measure, prompts, seconds  # noqa: E402
from model_8b import write_checkpoint  # noqa: E402

import qtool  # noqa: E402
from qtool.engine.engine import Engine  # noqa: E402
from qtool.events import ProgressEvent, StageEvent  # noqa: E402

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "tiny-python-llama"
SEQ_LEN = 2048


def checkpoint(folder: Path, kind: str, layers: int) -> Path:
    """Return a checkpoint with a tokenizer, which is only loaded."""
    found = folder / f"{kind}-{layers}"
    if not (found / "model.safetensors.index.json").exists():
        write_checkpoint(found, kind, layers=layers)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(EXAMPLE / name, found)
        torch.cuda.empty_cache()
    return found


def prefill_rate(path: Path) -> float:
    """Return the engine's prompt tokens a second, 64 prompts of 2048 tokens."""
    options = {"skip_tokenizer_init": True, "disable_radix_cache": True, "context_length": 4096}
    with Engine(path, **options) as engine:
        seconds(engine, prompts(8, SEQ_LEN), 1)
        return 64 * SEQ_LEN / seconds(engine, prompts(64, SEQ_LEN), 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("/tmp/8b"))
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--speed", action="store_true")
    given = parser.parse_args()
    random.seed(0)
    quantized, reference = (
        checkpoint(given.folder, kind, given.layers) for kind in ("fp8", "bf16")
    )
    data = given.folder / "ids.jsonl"
    rows = [json.dumps({"input_ids": ids}) for ids in prompts(given.tokens // SEQ_LEN + 1, SEQ_LEN)]
    data.write_text("\n".join(rows))
    began: dict[str, float] = {}

    def on_event(event: object) -> None:
        if isinstance(event, StageEvent | ProgressEvent):
            name = event.what if isinstance(event, StageEvent) else f"{event.what} {event.done}"
            began[name] = time.perf_counter()
            print(f"{time.perf_counter():.1f} {name}", flush=True)

    options = {"data": data, "max_tokens": given.tokens, "seq_len": SEQ_LEN, "answers": 0}
    found = qtool.evaluate(
        quantized,
        reference=reference,
        on_event=on_event,
        speed=given.speed,
        **{**options, "data": str(data)},
    )
    start = began["comparing"]
    done = began[f"comparing: tokens {found.data.tokens}"]
    rates = {name: prefill_rate(path) for name, path in (("fp8", quantized), ("bf16", reference))}
    floor = given.tokens * sum(1 / rate for rate in rates.values())
    report = {
        "tokens": found.data.tokens,
        "seconds": round(done - start, 2),
        "prefill_tokens_s": {name: round(rate) for name, rate in rates.items()},
        "of_prefill_of_both": round(floor / (done - start), 3),
        "measures": {name: each.value for name, each in found.measures.items()},
        "speed": {name: vars(each) for name, each in found.speed.items()},
    }
    if given.speed:
        options = {"skip_tokenizer_init": True, "disable_radix_cache": True}
        with Engine(quantized, context_length=4096, **options) as engine:
            seconds(engine, prompts(1, 64), 1)
            report["engine.py"] = measure(engine, quick=False)
    print(f"RESULT {json.dumps(report, default=str)}", flush=True)
    Path(os.environ.get("OUT", "."), "evaluation.json").write_text(json.dumps(report, default=str))


if __name__ == "__main__":
    main()
