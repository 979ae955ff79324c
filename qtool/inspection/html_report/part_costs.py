"""Charts of bars, and the cost of each part of a model as one of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qtool.checkpoint.part_costs import PartCost
from qtool.inspection.html_report.formatting import number_text

HEIGHT = 100.0  # of a chart's drawing
MAX_BARS = 400
MAX_ROWS = 10  # of the table below the chart


@dataclass(frozen=True)
class Bar:
    """One bar of a chart."""

    x: float
    width: float
    """In percent of the chart's width."""

    height: float
    """Of `HEIGHT`."""

    tip: str


@dataclass(frozen=True)
class PartCosts:
    """A chart of the parts that cost most, as they follow each other, and the worst of them."""

    bars: list[Bar]
    worst: Sequence[PartCost]
    all: int
    """How many parts were measured."""

    height: float = HEIGHT


def part_costs(costs: Sequence[PartCost]) -> PartCosts:
    """Return what the report shows of ``costs``, which are worst first."""
    bars = chart_bars([_bar(each) for each in in_model_order(costs[:MAX_BARS])])
    return PartCosts(bars, costs[:MAX_ROWS], len(costs))


def chart_bars(values: Sequence[tuple[float, str]]) -> list[Bar]:
    """Return a bar for each value and its tip; the highest fills the chart."""
    finite = [value for value, _ in values if math.isfinite(value)]
    highest = max(finite, default=0.0) or 1.0
    width = 100 / len(values) if values else 0.0
    return [
        Bar(
            x=number * width,
            width=width * 0.86,
            height=HEIGHT * (max(0.0, value / highest) if math.isfinite(value) else 1),
            tip=tip,
        )
        for number, (value, tip) in enumerate(values)
    ]


def in_model_order(costs: Sequence[PartCost]) -> list[PartCost]:
    """Return the parts as they follow each other in the model."""
    return sorted(
        costs,
        key=lambda each: [
            (0, int(word), "") if word.isdecimal() else (1, 0, word)
            for word in each.part.split(".")
        ],
    )


def _bar(cost: PartCost) -> tuple[float, str]:
    schemes = ", ".join(cost.schemes)
    return cost.mean_kl, f"{cost.part} ({schemes}): {number_text(cost.mean_kl)} nats"
