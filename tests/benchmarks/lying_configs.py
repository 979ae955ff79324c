"""Every folder of `support.lying_configs`: what the four commands say, and what `qtool.load` does.

`python tests/benchmarks/lying_configs.py [BASE ...]` prints the lies on which they disagree.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
from pathlib import Path

import torch

import qtool
from qtool.errors import QtoolError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from architecture.test_lying_configs import commands, outcome
from support.lying_configs import LIES, harmless_reason, make_bases, make_folder

TOKENS = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8] * 4])


def logits(folder: Path) -> torch.Tensor | str:
    try:
        model = qtool.load(folder, device="cpu")
        with torch.no_grad():
            return model(TOKENS, use_cache=False).logits.float()
    except QtoolError as error:
        return error.code
    except Exception as error:  # what a lie breaks is told, whatever it is
        return f"{type(error).__name__}: {str(error)[:60]}"


def verdict(found: torch.Tensor | str, true: torch.Tensor | str) -> str:
    if isinstance(found, str) or isinstance(true, str):
        return str(found)
    if not found.isfinite().all():
        return "NaN"
    return "same" if torch.equal(found, true) else "differs"


def main() -> None:
    wanted = set(sys.argv[1:])
    with tempfile.TemporaryDirectory() as place:
        bases = make_bases(Path(place))
        truths = {base: logits(bases[base]) for base in bases if not wanted or base in wanted}
        passed = 0
        for number, ((base, name), change) in enumerate(LIES.items()):
            if base not in truths:
                continue
            work = Path(place, str(number))
            work.mkdir()
            folder = make_folder(bases[base], work / "model", change)
            with contextlib.redirect_stdout(io.StringIO()):
                found = {key: outcome(each) for key, each in commands(base, folder).items()}
            if {code for code, _ in found.values()} != {3}:
                passed += 1
                reason = harmless_reason(base, name) or "WRONG"
                print(base, name, verdict(logits(folder), truths[base]), reason, found, sep=" | ")
        print(f"{passed} of {len(LIES)} lies pass")


if __name__ == "__main__":
    main()
