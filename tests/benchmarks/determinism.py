"""Run every method that runs on a CPU twice with one seed, and compare the weight files byte for
byte.

python tests/benchmarks/determinism.py [--methods A,B] [--num-samples 4] [--seq-len 128]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from qtool.recipe import catalogue

MODEL = Path(__file__).resolve().parents[2] / "examples" / "tiny-python-llama"


def main() -> None:
    """Print one line a method; exit 1 when a run failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", default="")
    parser.add_argument("--num-samples", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=128)
    arguments = parser.parse_args()
    names = [name for name in arguments.methods.split(",") if name] or [
        recipe.name for recipe in catalogue().values() if "cpu" in recipe.runs_on
    ]
    failed = False
    for name in names:
        digests = [weight_digests(name, arguments) for _ in range(2)]
        failed |= None in digests
        verdict = (
            "failed"
            if None in digests
            else "identical"
            if digests[0] == digests[1]
            else "different"
        )
        print(f"{name:<24} {verdict}", flush=True)
    sys.exit(failed)


def weight_digests(method: str, arguments: argparse.Namespace) -> dict[str, str] | None:
    """Quantize the tiny model; return the digest of each weight file, from the manifest, or None
    when the run failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        command = [
            sys.executable,
            "-m",
            "qtool.cli",
            "quantize",
            "--model-path",
            str(MODEL),
            "--method",
            method,
            "--output",
            str(output),
            "--quiet",
        ]
        data = [
            "--calibration",
            str(MODEL / "calibration.jsonl"),
            "--num-samples",
            str(arguments.num_samples),
            "--seq-len",
            str(arguments.seq_len),
        ]
        if subprocess.run(
            [*command, *data, "--device", "cpu"], stdout=subprocess.DEVNULL
        ).returncode:
            return None
        files = json.loads((output / "qtool-manifest.json").read_text())["files"]
        return {
            name: facts["sha256"] for name, facts in files.items() if name.endswith(".safetensors")
        }


if __name__ == "__main__":
    main()
