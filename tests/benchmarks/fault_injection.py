"""Let every file operation of `quantize`, `export` and `inspect` fail, in the command and in the
worker, with each error of the system: a code and exit 3, 4 or 6, nothing half-written, no
traceback, and the next run works.

    python tests/benchmarks/fault_injection.py [--scenario export ...] [--sample 200 | --each]
        [--seed 0]

Every operation gets every error, which takes hours where libraries run; with ``--each`` every
operation on every file gets one of the errors, the first time that it happens. Of a worker,
``stat`` is left out: libraries take an error there for a file that is missing.
"""

from __future__ import annotations

import argparse
import collections
import random
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.faults import ERRORS, SCENARIOS, Fault, Faults, may_fail


def main() -> None:
    """Inject, print a table, and exit with 1 when something was not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenario", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--sample", type=int, help="faults in each process of each scenario")
    parser.add_argument("--each", action="store_true", help="one fault for each operation and file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tolerated", action="store_true", help="show faults with exit code 0")
    arguments = parser.parse_args()
    bad = 0
    for name in arguments.scenario:
        dice = random.Random(arguments.seed)
        bad += inject(name, arguments, dice)
    print(f"{bad} faults were not handled")
    sys.exit(bool(bad))


def choose(
    process: str, operations: Sequence[str], arguments: argparse.Namespace, dice: random.Random
) -> list[Fault]:
    """Return the faults to inject into a process that does ``operations``."""
    may = [number for number, each in enumerate(operations) if may_fail(process, each)]
    if arguments.each:
        first = {re.sub(r"\d+", "N", operations[number]): number for number in reversed(may)}
        return [Fault(process, number, dice.choice(ERRORS)) for number in first.values()]
    faulty = [Fault(process, number, error) for number in may for error in ERRORS]
    return dice.sample(faulty, min(arguments.sample or len(faulty), len(faulty)))


def inject(scenario: str, arguments: argparse.Namespace, dice: random.Random) -> int:
    """Inject faults into one scenario; return how many were not handled."""
    bad = 0
    processes = ["command"] if "quantize" not in SCENARIOS[scenario][0] else ["command", "worker"]
    with tempfile.TemporaryDirectory() as folder, Faults(scenario, Path(folder)) as faults:
        for process in processes:
            start = time.monotonic()
            clean = faults.run(Fault(process, -1))
            assert not clean.problems, (clean.problems, clean.stderr)
            chosen = choose(process, clean.operations, arguments, dice)
            ends: collections.Counter[str] = collections.Counter()
            for fault in chosen:
                found = faults.run(fault)
                ends[f"{found.exit_code} {found.code}".strip()] += 1
                where = found.operations[fault.number : fault.number + 1]
                if arguments.tolerated and not found.exit_code:
                    print(f"{scenario}, {process}: {fault} {where}: tolerated", flush=True)
                if found.problems:
                    bad += 1
                    print(f"{scenario}, {process}: {fault} {where}: {found.problems}", flush=True)
                    print(f"    {found.stderr.strip()[-600:]}", flush=True)
            print(
                f"{scenario:20} {process:8} {len(clean.operations):5} operations, "
                f"{len(chosen):5} faults, {time.monotonic() - start:6.1f} s: {dict(ends)}",
                flush=True,
            )
    return bad


if __name__ == "__main__":
    main()
