"""Run every method on the tiny model and measure what comes out: the table in recipes/README.md.

    python tests/benchmarks/methods.py [--methods A,B] [--device cpu] [--results FILE.json] [--write
    recipes/README.md]

Perplexity is that of the first 512 tokens of each text in evaluation.jsonl, on the checkpoint as it
lies on disk: weights dequantized, inputs rounded as its activation format says.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from qtool.checkpoint import Checkpoint, open_checkpoint
from qtool.evaluation.perplexity import load_dequantized, perplexity
from qtool.formats import detect
from qtool.recipe import Recipe, catalogue

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "tiny-python-llama"
START, END = "<!-- table: tests/benchmarks/methods.py -->", "<!-- end -->"


def main() -> None:
    """Measure, print one line a method, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", default="")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--num-samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--results", type=Path, default=Path("methods.json"))
    parser.add_argument(
        "--write", type=Path, help="replace the table in this file by the results so far"
    )
    arguments = parser.parse_args()
    results: dict[str, Any] = (
        json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
    )
    if arguments.write:
        write_table(arguments.write, results)
        return
    names = [name for name in arguments.methods.split(",") if name] or [
        recipe.name
        for recipe in catalogue().values()
        if "cpu" in recipe.runs_on or arguments.device != "cpu"
    ]
    texts = held_out()
    if "bf16" not in results:
        results["bf16"] = {
            "perplexity": perplexity(load_dequantized(open_checkpoint(MODEL)), texts)
        }
    for name in names:
        results[name] = measure(catalogue()[name], arguments, texts)
        print(name, json.dumps(results[name]), flush=True)
        arguments.results.write_text(json.dumps(results, indent=1))


def held_out() -> list[list[int]]:
    """Return the token ids of every text in evaluation.jsonl."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    lines = (MODEL / "evaluation.jsonl").read_text().splitlines()
    return [tokenizer(json.loads(line)["text"])["input_ids"] for line in lines]


def measure(
    recipe: Recipe, arguments: argparse.Namespace, texts: list[list[int]]
) -> dict[str, Any]:
    """Quantize the tiny model by one method; return seconds, bits per quantized weight and
    perplexity, or the error.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        data = [
            "--calibration",
            str(MODEL / "calibration.jsonl"),
            "--num-samples",
            str(arguments.num_samples),
        ]
        data += ["--seq-len", str(arguments.seq_len), "--pack"]
        command = [
            sys.executable,
            "-m",
            "qtool.cli",
            "quantize",
            "--model-path",
            str(MODEL),
            "--method",
            recipe.name,
            "--output",
            str(output),
        ]
        start = time.monotonic()
        done = subprocess.run(
            [*command, "--device", arguments.device, *data, "-q"], capture_output=True, text=True
        )
        seconds = time.monotonic() - start
        if done.returncode:
            log = output.with_name("out.qtool.log")
            return {
                "error": done.stderr.strip(),
                "log": log.read_text()[-3000:] if log.exists() else "",
            }
        checkpoint = open_checkpoint(output)
        layout = detect(checkpoint)
        modules = layout.modules.values() if layout else []
        weights = sum(module.shape[0] * module.shape[1] for module in modules)
        bits = sum(module.size_bytes for module in modules) * 8 / weights if weights else 16.0
        return {
            "device": arguments.device,
            "seconds": round(seconds, 1),
            "bits": round(bits, 3),
            "format": layout.format if layout else "-",
            "perplexity": perplexity(load(checkpoint), texts),
        }


def load(checkpoint: Checkpoint) -> Any:
    """Return the model to measure: qtool's own reading of it, or transformers' where a kernel's
    layout is read by nobody else.
    """
    if any(name.endswith("scale_and_zero") for name in checkpoint.tensors):
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(
            checkpoint.path, device_map="cuda", dtype="auto"
        )
    return load_dequantized(checkpoint)


def write_table(readme: Path, results: dict[str, Any]) -> None:
    """Put the results between the marks in ``readme``."""
    base = results["bf16"]["perplexity"]
    rows = [
        "| method | backend | scheme | bits a weight | seconds | perplexity | x bf16 |",
        "|---|---|---|---|---|---|---|",
    ]
    rows.append(f"| (bf16) | | | 16 | | {base:.3f} | 1 |")
    for recipe in catalogue().values():
        found = results.get(recipe.name)
        name = f"`{recipe.name}`" + (" (experimental)" if recipe.experimental else "")
        scheme = (recipe.scheme.name if recipe.scheme else "") + (
            f" + {recipe.kv_cache} KV" if recipe.kv_cache else ""
        )
        if found is None or "error" in found:
            rows.append(
                f"| {name} | {recipe.backend} | {scheme} | | {'failed' if found else 'not run'} | "
                "| |"
            )
            continue
        seconds = f"{found['seconds']:.0f}" + (
            "" if found.get("device", "cpu") == "cpu" else " (GPU)"
        )
        ratio = found["perplexity"] / base
        rows.append(
            f"| {name} | {recipe.backend} | {scheme} | {found['bits']:.2f} | {seconds} | "
            f"{found['perplexity']:.3f} | {ratio:.3f} |"
        )
    before, _, rest = readme.read_text().partition(START)
    readme.write_text(before + START + "\n" + "\n".join(rows) + "\n" + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
