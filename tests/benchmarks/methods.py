"""Run every method on two models and measure what comes out: the table in recipes/README.md.

    python tests/benchmarks/methods.py [--models tiny,outliers] [--methods A,B] [--device cpu]
    python tests/benchmarks/methods.py --write recipes/README.md

The first measures, and keeps what it finds in --results; the second writes the table. `tiny` is the
bundled model, `outliers` what examples/outlier_model.py makes of it. Perplexity is that of the
first 512 tokens of each text in evaluation.jsonl, on the checkpoint as it lies on disk: weights
dequantized, inputs rounded as its activation format says.
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
TINY = ROOT / "examples" / "tiny-python-llama"
MODELS = ("tiny", "outliers")
Results = dict[str, dict[str, Any]]  # model -> method -> what was measured
START, END = "<!-- table: tests/benchmarks/methods.py -->", "<!-- end -->"


def main() -> None:
    """Measure, print one line a method, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--methods", default="")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--num-samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--results", type=Path, default=Path("methods.json"))
    parser.add_argument(
        "--write", type=Path, help="replace the table in this file by the results so far"
    )
    arguments = parser.parse_args()
    results: Results = (
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
    with tempfile.TemporaryDirectory() as folder:
        for model in arguments.models.split(","):
            path = model_folder(model, Path(folder))
            found = results.setdefault(model, {})
            if "bf16" not in found:
                base = load_dequantized(open_checkpoint(path))
                found["bf16"] = {"perplexity": perplexity(base, texts)}
            for name in names:
                found[name] = measure(path, catalogue()[name], arguments, texts)
                print(model, name, json.dumps(found[name]), flush=True)
                arguments.results.write_text(json.dumps(results, indent=1))


def model_folder(model: str, folder: Path) -> Path:
    """Return the folder of one of MODELS; those that must be made are put into ``folder``."""
    if model == "tiny":
        return TINY
    script = ROOT / "examples" / "outlier_model.py"
    subprocess.run([sys.executable, script, folder / model], check=True, stdout=sys.stderr)
    return folder / model


def held_out() -> list[list[int]]:
    """Return the token ids of every text in evaluation.jsonl."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    lines = (TINY / "evaluation.jsonl").read_text().splitlines()
    return [tokenizer(json.loads(line)["text"])["input_ids"] for line in lines]


def measure(
    model: Path, recipe: Recipe, arguments: argparse.Namespace, texts: list[list[int]]
) -> dict[str, Any]:
    """Quantize ``model`` by one method; return seconds, bits per quantized weight and
    perplexity, or the error.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        data = [
            "--calibration",
            str(TINY / "calibration.jsonl"),
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
            str(model),
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


def write_table(readme: Path, results: Results) -> None:
    """Put the results between the marks in ``readme``."""
    tiny, outliers = (results[model] for model in MODELS)
    rows = [
        "| method | backend | scheme | bits a weight | seconds | perplexity | x bf16 | with "
        "outliers | x bf16 |",
        "|---|---|---|---|---|---|---|---|---|",
        "| (bf16) | | | 16 | | "
        + " | ".join(f"{found['bf16']['perplexity']:.3f} | 1" for found in (tiny, outliers))
        + " |",
    ]
    for recipe in catalogue().values():
        name = f"`{recipe.name}`" + (" (experimental)" if recipe.experimental else "")
        scheme = (recipe.scheme.name if recipe.scheme else "") + (
            f" + {recipe.kv_cache} KV" if recipe.kv_cache else ""
        )
        bits, seconds = cost(tiny.get(recipe.name, {}))
        quality = [shown(found, recipe.name) for found in (tiny, outliers)]
        cells = [name, recipe.backend, scheme, bits, seconds, *quality]
        rows.append(f"| {' | '.join(cells)} |")
    before, _, rest = readme.read_text().partition(START)
    readme.write_text(before + START + "\n" + "\n".join(rows) + "\n" + END + rest.partition(END)[2])


def cost(found: dict[str, Any]) -> tuple[str, str]:
    """Return the cells for bits a weight and seconds."""
    if "bits" not in found:
        return "", ""
    device = "" if found.get("device", "cpu") == "cpu" else " (GPU)"
    return f"{found['bits']:.2f}", f"{found['seconds']:.0f}{device}"


def shown(found: dict[str, Any], method: str) -> str:
    """Return the cells for perplexity and its ratio to that of the model in 16 bits."""
    value = found.get(method)
    if value is None or "error" in value:
        return f"{'failed' if value else 'not run'} | "
    return f"{value['perplexity']:.3f} | {value['perplexity'] / found['bf16']['perplexity']:.3f}"


if __name__ == "__main__":
    main()
