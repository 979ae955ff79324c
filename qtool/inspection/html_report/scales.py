"""The histograms of scales in the HTML report, one for each kind of module."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

from qtool.inspection.deep import ModuleNumbers
from qtool.inspection.html_report.details import ModuleDetails, row_labels, row_rank
from qtool.inspection.html_report.formatting import log2


@dataclass(frozen=True)
class Bar:
    """One bar of a histogram, in percent of its width and height."""

    x: float
    height: float
    tip: str
    """Text of the tooltip."""


@dataclass(frozen=True)
class Histogram:
    """How the scales of one kind of module are spread."""

    label: str
    bars: list[Bar]
    total: int
    low: float
    """The smallest scale."""
    high: float
    """The largest scale."""
    at: tuple[float | None, float | None]
    """Where the smallest and the largest scale lie, in percent of the width."""


@dataclass(frozen=True)
class Histograms:
    """All histograms; they share one axis, with a bin for each power of two."""

    charts: list[Histogram]
    first: int
    """The exponent where the axis begins."""
    last: int
    """The exponent where the axis ends."""
    bar_width: float
    """In percent of the width."""


@dataclass
class _Scales:
    bins: Counter[int] = field(default_factory=Counter)
    ends: list[float] = field(default_factory=list)

    def add(self, numbers: ModuleNumbers) -> None:
        for exponent, count in numbers.scale_histogram:
            if count > 0:
                self.bins[exponent] += count
        ends = (numbers.scale_min, numbers.scale_max)
        self.ends += [value for value in ends if math.isfinite(value)]


def scale_histograms(details: ModuleDetails) -> Histograms | None:
    """Return the histograms of all kinds of modules; None when there are no scales."""
    by_label = _scales_by_label(details)
    exponents = {exponent for scales in by_label.values() for exponent in scales.bins}
    if not exponents:
        return None
    first = min(exponents)
    last = max(exponents)
    span = last - first + 1
    return Histograms(
        charts=[
            _histogram(label, by_label[label], first, span)
            for label in sorted(by_label, key=row_rank)
        ],
        first=first,
        last=last + 1,
        bar_width=100 / span,
    )


def _scales_by_label(details: ModuleDetails) -> dict[str, _Scales]:
    modules = [module for module in details.modules if module.name in details.numbers]
    labels = row_labels(modules)
    by_label: dict[str, _Scales] = {}
    for module in modules:
        scales = by_label.setdefault(labels[module.name], _Scales())
        scales.add(details.numbers[module.name])
    return by_label


def _histogram(label: str, scales: _Scales, first: int, span: int) -> Histogram:
    def position(value: float) -> float | None:
        return min(max(100 * (log2(value) - first) / span, 0.0), 100.0) if value > 0 else None

    most = max(scales.bins.values(), default=1)
    low = min(scales.ends, default=math.nan)
    high = max(scales.ends, default=math.nan)
    return Histogram(
        label=label,
        bars=[
            Bar(
                x=100 * (exponent - first) / span,
                height=max(100 * count / most, 1.5),
                tip=f"2^{exponent} to 2^{exponent + 1}: {count:,} scales",
            )
            for exponent, count in sorted(scales.bins.items())
        ],
        total=sum(scales.bins.values()),
        low=low,
        high=high,
        at=(position(low), position(high)),
    )
