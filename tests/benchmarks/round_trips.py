"""Convert checkpoints to every format that holds them and back: are codes and scales the same
bytes, and is perplexity the same number?

    python tests/benchmarks/round_trips.py FOLDER... [--texts 12] [--max-tokens 256]

Perplexity is that of the first texts in evaluation.jsonl, before, in the other format, and after;
for bf16, where there is no way back, of the checkpoint alone. A target that refuses a checkpoint
stands in its last lines, with the reason.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from methods import held_out

import qtool
from qtool.checkpoint import Checkpoint, open_checkpoint
from qtool.conversion import TARGETS
from qtool.conversion.targets import GPTQ_V2, UNQUANTIZED
from qtool.errors import QtoolError
from qtool.evaluation.perplexity import load_dequantized, perplexity
from qtool.formats import WRITABLE, detect


@dataclass(frozen=True)
class Trip:
    """One checkpoint in one other format; ``after`` and ``differing`` are empty where there is no
    way back.
    """

    to: str
    between: float | None
    after: float | None
    differing: tuple[str, ...]
    refused: str = ""


def main() -> None:
    """Measure every folder and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--texts", type=int, default=12)
    parser.add_argument("--max-tokens", type=int, default=256)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    texts = held_out()[: arguments.texts]
    print(
        "| checkpoint | format | scheme | to | codes and scales | perplexity before | between | "
        "after |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for folder in arguments.folders:
        for line in report(folder, texts, arguments.max_tokens):
            print(line, flush=True)


def report(folder: Path, texts: Sequence[Sequence[int]], max_tokens: int) -> list[str]:
    """Return the lines of the table for one checkpoint."""

    def measured(path: Path) -> float | None:
        try:
            return perplexity(load_dequantized(open_checkpoint(path)), texts, max_tokens)
        except QtoolError as error:
            print(f"<!-- {path.name}: {error} -->")
            return None

    source = open_checkpoint(folder)
    layout = detect(source)
    if layout is None:
        return [f"| {folder.name} | none | | | | | | |"]
    schemes = ", ".join(dict.fromkeys(module.scheme.name for module in layout.modules.values())) + (
        " + KV" if layout.kv_cache else ""
    )
    before = measured(folder)
    lines, refusals = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for to in TARGETS:
            trip = travel(source, to, Path(scratch), measured)
            if trip.refused:
                refusals.append(f"{to}: {trip.refused}")
                continue
            numbers = " | ".join(
                "" if number is None else f"{number:.6f}"
                for number in (before, trip.between, trip.after)
            )
            same = (
                "dequantized"
                if to in UNQUANTIZED
                else "no way back"
                if layout.format not in WRITABLE
                else verdict(trip)
            )
            lines.append(
                f"| {folder.name} | {layout.format} | {schemes} | {to} | {same} | {numbers} |"
            )
    return [*lines, *(f"<!-- {folder.name} is refused by {refusal} -->" for refusal in refusals)]


def verdict(trip: Trip) -> str:
    """Return what became of the bytes."""
    return (
        f"DIFFER: {', '.join(trip.differing[:3])} ({len(trip.differing)})"
        if trip.differing
        else "identical"
    )


def travel(source: Checkpoint, to: str, scratch: Path, measured) -> Trip:
    """Convert ``source`` to ``to`` and back."""
    layout = detect(source)
    there, again = scratch / "there", scratch / "again"
    for path in (there, again):
        shutil.rmtree(path, ignore_errors=True)
    try:
        qtool.export(source.path, to=to, output=there)
        between = measured(there)
        if to in UNQUANTIZED or layout.format not in WRITABLE:
            return Trip(to, between, None, ())
        is_v2 = {module.variant for module in layout.modules.values()} == {GPTQ_V2}
        qtool.export(
            there, to=GPTQ_V2 if is_v2 else layout.format, output=again, max_shard_size="2MiB"
        )
    except QtoolError as error:
        return Trip(to, None, None, (), f"{error.code} {error.message}")
    except Exception as error:  # a bug, to be seen in the table and not at its end
        return Trip(to, None, None, (), f"CRASH {error!r}")
    return Trip(to, between, measured(again), tuple(differing(source, open_checkpoint(again))))


def differing(one: Checkpoint, other: Checkpoint) -> list[str]:
    """Return the names of tensors that are not the same bytes, dtype and shape in both."""

    def content(checkpoint: Checkpoint, name: str) -> tuple[object, ...] | None:
        tensor = checkpoint.tensors.get(name)
        return tensor and (tensor.dtype, tensor.shape, checkpoint.read(name))

    return [
        name
        for name in {**one.tensors, **other.tensors}
        if content(one, name) != content(other, name)
    ]


if __name__ == "__main__":
    main()
