"""Time ``qtool quantize`` against a bare script of the same library, alternately, on the same
inputs.

Prints a table and one line of JSON: seconds of the whole process, the median of the runs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
LIBRARIES = {
    "w4a16_gptq": "llmcompressor",
    "fp8_dynamic": "llmcompressor",
    "gptq_int4": "gptqmodel",
    "modelopt_fp8": "modelopt",
    "modelopt_fp4": "modelopt",
    "modelopt_int4_awq": "modelopt",
}


def commands(method: str, args: argparse.Namespace) -> dict[str, list[str]]:
    """Return the two command lines for ``method``; each wants the output folder as its last
    argument.
    """
    library = LIBRARIES[method]
    options = [
        "--method",
        method,
        "--num-samples",
        str(args.num_samples),
        "--seq-len",
        str(args.seq_len),
        "--device",
        args.device,
    ]
    model, calibration = str(args.model.resolve()), str(args.calibration.resolve())
    qtool = [
        "-m",
        "qtool.cli",
        "quantize",
        "--model-path",
        model,
        "--calibration",
        calibration,
        "--backend",
        library,
        "--seed",
        "0",
    ]
    return {
        "bare": [sys.executable, str(HERE / f"bare_{library}.py"), *options, model, calibration],
        "qtool": [sys.executable, *qtool, *options, "--output"],
    }


def environment(device: str) -> dict[str, str]:
    """Return the environment of both sides: this checkout's qtool, no network and, on CPU, what
    GPTQModel needs there.

    Threads wait passively on CPU: spinning ones cost up to ten times the time, at random, on a
    machine that others use too.
    """
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    added = {"PYTHONPATH": os.pathsep.join(path for path in paths if path), "HF_HUB_OFFLINE": "1"}
    if device == "cpu":
        added |= {
            "GPTQMODEL_CPU_WORKERS": "2",
            "GPTQMODEL_DISABLE_PACK_EXT": "1",
            "OMP_WAIT_POLICY": "passive",
        }
    return {**os.environ, **added}


def run_seconds(command: list[str], device: str, scratch: Path | None) -> float | None:
    """Run ``command`` into a fresh folder and return its wall time; None, and its last words on
    stderr, when it failed.
    """
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        command = [*command, str(Path(folder) / "out")]
        start = time.perf_counter()
        done = subprocess.run(
            command, cwd=folder, env=environment(device), capture_output=True, text=True
        )
        seconds = time.perf_counter() - start
    if done.returncode == 0:
        print(
            *(line for line in done.stderr.splitlines() if line.startswith("[") and " s] " in line),
            sep="\n",
            file=sys.stderr,
        )
        return seconds
    print(
        f"exit code {done.returncode}: {' '.join(command)}\n{done.stderr[-3000:]}", file=sys.stderr
    )
    return None


def compare(method: str, args: argparse.Namespace) -> dict[str, list[float]]:
    """Return the seconds of both sides, run alternately; a side that failed once is not run
    again.
    """
    seconds: dict[str, list[float]] = {"bare": [], "qtool": []}
    pending = commands(method, args)
    for _ in range(args.runs):
        for side, command in list(pending.items()):
            taken = run_seconds(command, args.device, args.scratch)
            print(
                f"{method} {side}: {'failed' if taken is None else f'{taken:.1f} s'}",
                file=sys.stderr,
                flush=True,
            )
            if taken is None:
                del pending[side]
            else:
                seconds[side].append(taken)
    return {side: seconds[side] if side in pending else [] for side in seconds}


def summary(seconds: dict[str, list[float]]) -> dict[str, float | None]:
    """Return the medians of both sides and their ratio; None where a side failed."""
    bare, qtool = (
        round(statistics.median(seconds[side]), 2) if seconds[side] else None
        for side in ("bare", "qtool")
    )
    return {
        "bare_s": bare,
        "qtool_s": qtool,
        "ratio": round(qtool / bare, 3) if bare and qtool else None,
    }


def main() -> int:
    """Run the comparisons; the exit code is 1 when a command failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    example = REPOSITORY / "examples" / "tiny-python-llama"
    parser.add_argument("--model", type=Path, default=example)
    parser.add_argument("--calibration", type=Path, default=example / "calibration.jsonl")
    parser.add_argument("--methods", nargs="+", choices=list(LIBRARIES), default=list(LIBRARIES))
    parser.add_argument("--num-samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--scratch",
        type=Path,
        help="folder for the outputs, which are deleted; the system's own otherwise",
    )
    args = parser.parse_args()

    seconds = {method: compare(method, args) for method in args.methods}
    table = {method: summary(sides) for method, sides in seconds.items()}
    print(f"{'method':<20} {'bare s':>9} {'qtool s':>9} {'ratio':>7}")
    for method, row in table.items():
        print(
            f"{method:<20}",
            *(
                f"{'failed' if value is None else format(value, '.2f'):>{width}}"
                for value, width in zip(row.values(), (9, 9, 7), strict=True)
            ),
        )
    print(
        json.dumps(
            {
                "model": args.model.name,
                "device": args.device,
                "runs": args.runs,
                "methods": table,
                "seconds": seconds,
            }
        )
    )
    return 0 if all(row["ratio"] is not None for row in table.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
