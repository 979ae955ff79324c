"""Does the default gate let sound checkpoints pass and stop faulty ones? Each of the faults of
`tests/support/planted_faults.py` is planted into a quantized checkpoint, and each is evaluated on
several choices of texts.

    python tests/benchmarks/gate.py CHECKPOINT REFERENCE [--choices 20] [--tokens 4096]

Exits with 1 when a sound checkpoint fails, or a faulty one passes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support import EXAMPLE
from support.planted_faults import FAULTS, plant

import qtool


def main() -> None:
    """Evaluate, print a line for each checkpoint, and exit with 1 when a verdict is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("reference", type=Path)
    parser.add_argument("--data", default=str(EXAMPLE / "evaluation.jsonl"))
    parser.add_argument("--choices", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--answers", type=int, default=4)
    parser.add_argument("--faults", nargs="*", choices=FAULTS, default=list(FAULTS))
    given = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        cases = {"sound": given.checkpoint}
        for fault in given.faults:
            cases[fault] = plant(given.checkpoint, fault, Path(folder) / fault)
        for name, checkpoint in cases.items():
            failed = []
            ratios = []
            for seed in range(given.choices):
                found = qtool.evaluate(
                    checkpoint,
                    reference=given.reference,
                    data=given.data,
                    gate="default",
                    seed=seed,
                    max_tokens=given.tokens,
                    seq_len=512,
                    answers=given.answers,
                )
                failed += [seed] if found.failed else []
                ratios.append(found.measures["ppl_ratio"].value)
            wrong += len(failed) if name == "sound" else given.choices - len(failed)
            print(
                f"{given.checkpoint.name} {name:16} failed on {len(failed)} of {given.choices}; "
                f"perplexity ratio {min(ratios):.4f} to {max(ratios):.4f}",
                flush=True,
            )
    print(f"{wrong} verdicts are wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
