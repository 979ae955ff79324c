"""Kill runs with SIGKILL at random moments, over all backends that run on a CPU and `export`: each
time the output is absent or complete (`qtool inspect --verify`), the source is unchanged, and the
next run works.

    python tests/benchmarks/kills.py [--times 200] [--seed 0] [--method fp8_dynamic ...]

A kill hits the command alone, as a user's `kill -9` does, its worker, as the system does when
memory runs out, or its whole process group at once, as a machine does. Half of the runs replace a
former output with `--overwrite`: then that one, or the new one, is there and complete.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support import EXAMPLE

QTOOL = [sys.executable, "-m", "qtool.cli"]
DATA = [
    "--calibration",
    str(EXAMPLE / "calibration.jsonl"),
    "--num-samples",
    "2",
    "--seq-len",
    "64",
]
METHODS = {  # what is killed -> its arguments
    "export f16": ["export", "--to", "f16"],
    "export fp8_block": ["export", "--to", "fp8_block", "--requantize", "--scheme", "FP8_BLOCK"],
    "fp8_dynamic": ["quantize", "--device", "cpu", "--method", "fp8_dynamic"],
    "fp8_static": ["quantize", "--device", "cpu", "--method", "fp8_static", *DATA],
    "modelopt_fp8": ["quantize", "--device", "cpu", "--method", "modelopt_fp8", *DATA],
    "gptq_int4": ["quantize", "--device", "cpu", "--method", "gptq_int4", *DATA],
    "torchao_int8wo": ["quantize", "--device", "cpu", "--method", "torchao_int8wo"],
}
TARGETS = ("command", "worker", "group")


@dataclass(frozen=True)
class Kill:
    """One kill and what it left."""

    method: str
    target: str
    delay_s: float
    overwrote: bool
    hit: str
    """running, or too late when the run had ended."""
    output: str
    """absent, former, complete or half."""


class Place:
    """A source, an output, and the former output that a run may replace."""

    def __init__(self, folder: Path) -> None:
        self.source = folder / "model"
        self.output = folder / "out"
        self.former = folder / "former"
        shutil.copytree(EXAMPLE, self.source)
        self._digests = digests(self.source)

    def command(self, method: str, *, overwrite: bool) -> list[str]:
        """Return the command line of a run."""
        name, *options = METHODS[method]
        places = ["--model-path", str(self.source), "--output", str(self.output), "--quiet"]
        return [*QTOOL, name, *places, *options, *(["--overwrite"] if overwrite else [])]

    def state(self) -> str:
        """Return whether the output is absent, complete by its manifest, or half there."""
        if not self.output.exists():
            return "absent"
        verify = [*QTOOL, "inspect", "--verify", "--quiet", "--model-path", str(self.output)]
        done = subprocess.run(verify, capture_output=True)
        return "half" if done.returncode else "complete"

    def clear(self, *, former: bool) -> None:
        """Remove the output of the run before, as a user would; put a former one there if asked."""
        if self.output.exists():
            shutil.rmtree(self.output)
        if former:
            shutil.copytree(self.former, self.output)

    def source_is_unchanged(self) -> bool:
        return digests(self.source) == self._digests


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def workers_of(pid: int) -> Iterator[int]:
    """Yield the children of the process ``pid``."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        yield from map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


def kill_once(place: Place, method: str, whole_s: float, target: str, dice: random.Random) -> Kill:
    """Start a run, kill it, and look."""
    overwrite = dice.random() < 0.5
    place.clear(former=overwrite)
    # every third kill near the end, where files are published
    late = dice.random() < 1 / 3
    delay_s = dice.uniform(0.85, 1.02) * whole_s if late else dice.uniform(0, whole_s)
    run = subprocess.Popen(
        place.command(method, overwrite=overwrite),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    time.sleep(delay_s)
    hit = "too late" if run.poll() is not None else "running"
    with contextlib.suppress(ProcessLookupError):
        if target == "group":
            os.killpg(run.pid, signal.SIGKILL)
        elif target == "command":
            os.kill(run.pid, signal.SIGKILL)
        else:
            for worker in workers_of(run.pid):
                os.kill(worker, signal.SIGKILL)
    run.wait()
    output = place.state()
    if output == "complete" and overwrite and digests(place.output) == digests(place.former):
        output = "former"
    return Kill(method, target, delay_s, overwrite, hit, output)


def problems_of(kill: Kill, place: Place) -> list[str]:
    """Say what should not be after ``kill``."""
    problems = []
    if kill.output == "half" or (kill.overwrote and kill.output == "absent"):
        problems.append(f"the output is {kill.output}")
    if not place.source_is_unchanged():
        problems.append("the source was changed")
    return problems


def next_run_works(place: Place, method: str) -> list[str]:
    """Run again over what the kill left; say what does not work."""
    overwrite = place.output.exists()
    done = subprocess.run(
        place.command(method, overwrite=overwrite), capture_output=True, text=True
    )
    problems = []
    if done.returncode or place.state() != "complete":
        problems.append(f"the next run ended with {done.returncode}: {done.stderr[-300:]}")
    known = {"model", "former", "out", "out.qtool.log"}
    problems += [
        f"{path.name} is left" for path in place.output.parent.iterdir() if path.name not in known
    ]
    return problems


def main() -> None:
    """Kill, look, print a table; exit 1 when something was not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=200, help="kills in all")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check-next", type=int, default=4, help="run again after each Nth kill")
    arguments = parser.parse_args()
    dice = random.Random(arguments.seed)
    bad = 0
    kills: list[Kill] = []
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder))
        subprocess.run(
            place.command("export f16", overwrite=False), check=True, capture_output=True
        )
        place.output.rename(place.former)
        whole_s: dict[str, float] = {}
        for number in range(arguments.times):
            method = arguments.method[number % len(arguments.method)]
            if method not in whole_s:
                place.clear(former=False)
                start = time.monotonic()
                command = place.command(method, overwrite=False)
                subprocess.run(command, check=True, capture_output=True)
                whole_s[method] = time.monotonic() - start
            target = dice.choice(TARGETS if METHODS[method][0] == "quantize" else TARGETS[::2])
            kill = kill_once(place, method, whole_s[method], target, dice)
            kills.append(kill)
            if kill.hit == "too late":
                whole_s[method] *= 0.8  # the machine has less to do than when it was measured
            problems = problems_of(kill, place)
            if number % arguments.check_next == 0 or number == arguments.times - 1:
                problems += next_run_works(place, method)
            bad += bool(problems)
            print(f"{number + 1:4} {kill} {'; '.join(problems) or 'good'}", flush=True)
    print_table(kills)
    print(f"{len(kills)} kills, {bad} with problems")
    sys.exit(bool(bad))


def print_table(kills: list[Kill]) -> None:
    """Print how many kills left what, by what was killed."""
    outputs = ("absent", "former", "complete", "half")
    head = [*outputs, "too late"]
    print(f"{'method':18} {'target':8} {'kills':>6} " + " ".join(f"{name:>9}" for name in head))
    groups: dict[tuple[str, str], list[Kill]] = collections.defaultdict(list)
    for kill in kills:
        groups[kill.method, kill.target].append(kill)
    for (method, target), group in sorted(groups.items()):
        counts = [sum(kill.output == name for kill in group) for name in outputs]
        counts.append(sum(kill.hit == "too late" for kill in group))
        cells = " ".join(f"{count:9}" for count in counts)
        print(f"{method:18} {target:8} {len(group):6} {cells}")


if __name__ == "__main__":
    main()
