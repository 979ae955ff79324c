"""Perplexity of checkpoints as the runtime multiplies them, beside their dequantized form, and the
peak of memory while loading.

python tests/benchmarks/perplexity_on_device.py FOLDER... [--device cuda] [--texts 6]
"""

import argparse
import json
import time
import warnings
from pathlib import Path

import torch
from transformers import AutoTokenizer

from qtool.checkpoint import open_checkpoint
from qtool.evaluation.perplexity import load_dequantized, perplexity
from qtool.runtime.linear import QuantizedLinear
from qtool.runtime.load import materialize
from qtool.runtime.load_plan import plan_load

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "tiny-python-llama"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--texts", type=int, default=6)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    device = torch.device(options.device)
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE)
    lines = (EXAMPLE / "evaluation.jsonl").read_text().splitlines()[: options.texts]
    texts = [tokenizer(json.loads(line)["text"], verbose=False)["input_ids"] for line in lines]
    print(
        "| checkpoint | kernels | dequantized | runtime | difference | load, s | peak / model "
        "|\n|---|---|---|---|---|---|---|",
        flush=True,
    )
    worst = 0.0
    for folder in options.folders:
        checkpoint = open_checkpoint(folder)
        expected = perplexity(load_dequantized(checkpoint).to(device), texts)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        model = materialize(plan_load(checkpoint, device))
        seconds = time.perf_counter() - start
        size = sum(
            tensor.nbytes
            for tensor in {
                id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]
            }.values()
        )
        peak = (
            f"{(torch.cuda.max_memory_allocated() - before) / size:.2f}"
            if device.type == "cuda"
            else "-"
        )
        found = perplexity(model, texts)
        kernels = ", ".join(
            sorted(
                {
                    module.choice.kernel
                    for module in model.modules()
                    if isinstance(module, QuantizedLinear)
                }
            )
        )
        worst = max(worst, abs(found / expected - 1))
        print(
            f"| {folder.name} | {kernels} | {expected:.4f} | {found:.4f} | "
            f"{found / expected - 1:+.3%} | {seconds:.2f} | {peak} |",
            flush=True,
        )
        del model
    print(f"worst: {worst:.3%}")
    raise SystemExit(worst > 0.005)


if __name__ == "__main__":
    main()
