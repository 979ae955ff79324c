"""How long a user waits for what should answer at once: the best of five runs of each command,
against its limit.

    python tests/benchmarks/startup.py

Ends with 1 when a limit is passed. A busy machine shows in the spread; run it on an idle one.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

QTOOL = Path(sys.executable).with_name("qtool")
MODEL = Path(__file__).resolve().parents[2] / "examples" / "tiny-python-llama"
RUNS = 5
COMMANDS = {  # what -> (arguments, limit in seconds)
    "qtool --help": (["--help"], 0.3),
    "qtool quantize --help": (["quantize", "--help"], 1.0),
    "qtool quantize --list": (["quantize", "--list"], 1.0),
    "qtool quantize --dry-run": (
        ["quantize", "--model-path", str(MODEL), "--method", "modelopt_fp8", "--dry-run"],
        1.0,
    ),
    "qtool inspect": (["inspect", "--model-path", str(MODEL)], 1.0),
}


def seconds(arguments: list[str], folder: str) -> float:
    start = time.perf_counter()
    subprocess.run([QTOOL, *arguments], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    slow = False
    with tempfile.TemporaryDirectory() as folder:
        for what, (arguments, limit_s) in COMMANDS.items():
            times = sorted(seconds(arguments, folder) for _ in range(RUNS))
            slow |= times[0] > limit_s
            print(
                f"{what:26} best {times[0]:.2f} s, worst {times[-1]:.2f} s, limit {limit_s:.1f} "
                f"s{'  TOO SLOW' if times[0] > limit_s else ''}"
            )
    sys.exit(slow)


if __name__ == "__main__":
    main()
