"""What each part of a quantized model costs by itself, as a manifest has it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qtool.checkpoint.manifest import MANIFEST, read_manifest
from qtool.errors import CheckpointRefused

KEY = "by_layer"  # in the manifest's evaluation


@dataclass(frozen=True)
class PartCost:
    """What one part of the model costs by itself."""

    part: str
    """A module of the model: a linear layer, the experts of a layer, or a decoder layer."""

    mean_kl: float
    """KL divergence from the reference with this part alone quantized; nats. NaN when the model
    then gives no numbers.
    """

    schemes: tuple[str, ...]
    """What its layers are quantized to."""

    @property
    def rank(self) -> float:
        """The cost for comparisons: not-a-number is above all."""
        return math.inf if math.isnan(self.mean_kl) else self.mean_kl


def worst_first(costs: Sequence[PartCost]) -> tuple[PartCost, ...]:
    """Return ``costs`` in descending order."""
    return tuple(sorted(costs, key=lambda each: -each.rank))


def read_part_costs(folder: Path) -> tuple[PartCost, ...]:
    """Return the costs in the manifest of ``folder``, worst first; none when it has none.

    Raises: CheckpointRefused, when the manifest cannot be read.
    """
    evaluation = read_manifest(folder).get("evaluation")
    costs = evaluation.get(KEY) if isinstance(evaluation, Mapping) else None
    if costs is None:
        return ()
    found = [_part_cost(each) for each in costs] if isinstance(costs, list) else [None]
    known = [each for each in found if each]
    if len(known) < len(found):
        raise CheckpointRefused(
            "E_MANIFEST",
            f"{folder / MANIFEST}: `{KEY}` does not list parts with their mean KL divergence",
        )
    return worst_first(known)


def _part_cost(entry: object) -> PartCost | None:
    """Return an entry of the manifest, where null stands for not-a-number; None for another."""
    if not isinstance(entry, Mapping):
        return None
    part, cost, schemes = (entry.get(key) for key in ("part", "mean_kl", "schemes"))
    if cost is None and "mean_kl" in entry:
        cost = math.nan
    if not isinstance(part, str) or not isinstance(cost, int | float) or isinstance(cost, bool):
        return None
    if not isinstance(schemes, list) or not all(isinstance(each, str) for each in schemes):
        return None
    return PartCost(part, float(cost), tuple(schemes))
