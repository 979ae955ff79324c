"""How many tokens of the calibration data routers sent to each expert, as a manifest has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qtool.checkpoint.manifest import MANIFEST, read_manifest
from qtool.checkpoint.strict_json import JsonDict
from qtool.errors import CheckpointRefused

FEW_TOKENS = 64  # what an expert computes is hardly known from fewer
EXAMPLES = 3
KEY = "expert_tokens"  # in the manifest


@dataclass(frozen=True)
class ExpertTokens:
    """The tokens that each expert got; the library may have calibrated it with more."""

    counts: Mapping[str, Sequence[int]]
    """The module that holds the experts of a layer -> tokens by the number of the expert."""

    @property
    def few(self) -> dict[str, int]:
        """The experts with fewer than `FEW_TOKENS` tokens, by name, those with fewest first."""
        found = {
            f"{stack}.{number}": count
            for stack, counts in self.counts.items()
            for number, count in enumerate(counts)
            if count < FEW_TOKENS
        }
        return dict(sorted(found.items(), key=lambda item: item[1]))

    def summary(self) -> str:
        """Return a line: the range, and the experts that got few."""
        every = [count for counts in self.counts.values() for count in counts]
        line = f"experts: {min(every):,} to {max(every):,} calibration tokens each"
        few = self.few
        if not few:
            return line
        named = ", ".join(f"{name} ({count})" for name, count in [*few.items()][:EXAMPLES])
        more = f" and {len(few) - EXAMPLES:,} more" if len(few) > EXAMPLES else ""
        return f"{line}; {len(few):,} of {len(every):,} below {FEW_TOKENS}: {named}{more}"


def read_expert_tokens(folder: Path) -> ExpertTokens | None:
    """Return the counts in the manifest of ``folder``; None when it has none.

    Raises: CheckpointRefused, when the manifest cannot be read.
    """
    counts = read_manifest(folder).get(KEY)
    if counts is None:
        return None
    if not isinstance(counts, Mapping) or not counts or not all(map(_are_counts, counts.values())):
        raise CheckpointRefused(
            "E_MANIFEST",
            f"{folder / MANIFEST}: `{KEY}` does not list a number of tokens for each expert",
        )
    return ExpertTokens({str(name): tuple(each) for name, each in counts.items()})


def to_manifest(tokens: ExpertTokens | None) -> JsonDict:
    """Return what a manifest says of ``tokens``; nothing for a model without experts."""
    return {KEY: {name: list(each) for name, each in tokens.counts.items()}} if tokens else {}


def _are_counts(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(type(count) is int and count >= 0 for count in value)
    )
