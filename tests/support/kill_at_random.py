"""Kill a run with SIGKILL at random moments: each time the output is absent or complete, and the
run after the last kill works.

    python -m support.kill_at_random [--times 20] [--method fp8_dynamic] [--seed 0]

Half of the kills hit the command alone, as a user's `kill -9` does, half hit its whole process
group at once, as a machine does.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from support import EXAMPLE

MODEL = EXAMPLE


def main() -> None:
    """Run, kill, look; exit 1 when an output was ever half there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--method", default="fp8_dynamic")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    dice = random.Random(arguments.seed)
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
            arguments.method,
            "--device",
            "cpu",
        ]
        command += [
            "--calibration",
            str(MODEL / "calibration.jsonl"),
            "--num-samples",
            "4",
            "--seq-len",
            "128",
            "--quiet",
            "--output",
            str(output),
        ]
        start = time.monotonic()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        whole_s = time.monotonic() - start
        print(f"a run that nobody kills: {whole_s:.1f} s, output {state(output)}")
        complete = 0
        for number in range(arguments.times):
            remove(output)
            late = number % 4 == 3  # every fourth kill near the end, where files are published
            delay_s = dice.uniform(0.85, 1.02) * whole_s if late else dice.uniform(0, whole_s)
            run = subprocess.Popen(
                command,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            time.sleep(delay_s)
            kill = os.killpg if number % 2 else os.kill
            with contextlib.suppress(ProcessLookupError):
                kill(run.pid, signal.SIGKILL)
            run.wait()
            found = state(output)
            complete += found == "complete"
            print(
                f"killed after {delay_s:5.1f} s ({'group' if number % 2 else 'command'}): output "
                f"{found}",
                flush=True,
            )
            if found == "half":
                sys.exit(1)
        remove(output)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        left = sorted(path.name for path in Path(folder).iterdir())
        print(
            f"the next run works: output {state(output)}, the folder holds {left}; {complete} of "
            f"{arguments.times} kills came after the end"
        )
        sys.exit(state(output) != "complete" or left != ["out", "out.qtool.log"])


def state(output: Path) -> str:
    """Return whether ``output`` is absent, complete by its own manifest, or half there."""
    if not output.exists():
        return "absent"
    manifest = output / "qtool-manifest.json"
    if not manifest.exists():
        return "half"
    files = json.loads(manifest.read_text())["files"]
    names = {path.name for path in output.iterdir()} - {manifest.name}
    good = names == set(files) and all(
        hashlib.sha256((output / name).read_bytes()).hexdigest() == files[name]["sha256"]
        for name in files
    )
    return "complete" if good else "half"


def remove(output: Path) -> None:
    """Remove the output of the run before, as a user would."""
    if output.exists():
        for path in output.iterdir():
            path.unlink()
        output.rmdir()


if __name__ == "__main__":
    main()
