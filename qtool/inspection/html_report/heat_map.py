"""The heat maps of the HTML report: one number of every module, by kind and layer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from qtool.inspection.comparison import Comparison
from qtool.inspection.deep import DeepReport
from qtool.inspection.html_report.details import ModuleDetails, row_labels, row_rank, stored_as
from qtool.inspection.html_report.formatting import log2, short
from qtool.inspection.report import Inspection, Module
from qtool.sizes import format_size

STEPS = 20  # colours of a heat map
MAX_COLUMNS = 256  # of a heat map; where there are more layers, neighbours share a column
MIN_DB_RANGE = 10  # on a shorter scale, noise would look like a finding
# ColorBrewer's YlGnBu: lightness alone orders it, so colour-blind readers see the order too. On a
# dark background the order is reversed, and "more" is always further from the background.
LIGHT_STOPS = (
    "#f4f8d4",
    "#d3eeb9",
    "#97d5bb",
    "#56bcc2",
    "#2c97bd",
    "#2469aa",
    "#243f8f",
    "#101f5c",
)
DARK_STOPS = (
    "#16263f",
    "#1c3a66",
    "#22568f",
    "#2878ad",
    "#3a9fbd",
    "#6cc3bd",
    "#b0dfb6",
    "#f3f7bf",
)


@dataclass(frozen=True)
class Measure:
    """A number of each module, and how a heat map shows it."""

    title: str
    note: str
    values: Mapping[str, float]
    """By module name."""
    low: float
    """The value that gets the colour nearest to the background."""
    high: float
    """The value that gets the colour furthest from the background."""
    cell_text: Callable[[float], str]
    legend_text: Callable[[float], str]
    scale: Callable[[float], float] = float
    """Applied to values before they are placed between ``low`` and ``high``."""

    def text(self, value: float) -> str:
        """Return ``value`` as a cell shows it."""
        return "NaN" if math.isnan(value) else self.cell_text(value)

    def shade(self, value: float) -> float:
        """Return where ``value`` lies between ``low``, 0, and ``high``, 1; NaN counts as 1."""
        if math.isnan(value):
            return 1.0
        low = self.scale(self.low)
        high = self.scale(self.high)
        return min(max((self.scale(value) - low) / (high - low), 0.0), 1.0)

    def step(self, value: float) -> int:
        """Return the index of the colour of ``value``."""
        return min(int(self.shade(value) * STEPS), STEPS - 1)

    def ticks(self) -> list[str]:
        """Return the labels of the legend: both ends and the middle."""
        if self.scale is log2:
            middle = math.sqrt(self.low * self.high)
        else:
            middle = (self.low + self.high) / 2
        return [self.legend_text(value) for value in (self.low, middle, self.high)]


@dataclass(frozen=True)
class Cell:
    """One cell of a heat map."""

    text: str
    step: int
    """Index of its colour."""
    tip: str
    """Text of the tooltip."""
    filter: str
    """Words that find its modules in the list of all modules."""


@dataclass(frozen=True)
class HeatMap:
    """One heat map: a row for each kind of module, a column for each layer."""

    measure: Measure
    label_rem: float
    """Width of the row labels."""
    columns: list[str]
    label_every: int
    """Only every so many columns have a heading."""
    rows: list[tuple[str, list[Cell | None]]]
    outside: list[tuple[str, Cell | None]]
    """The modules that are in no layer, by kind."""


def heat_maps(inspection: Inspection, details: ModuleDetails) -> list[HeatMap]:
    """Return a heat map for each number that is known of the modules."""
    return [_heat_map(measure, details) for measure in _measures(inspection)]


def _measures(inspection: Inspection) -> Iterator[Measure]:
    if not inspection.modules:
        return
    yield _bits(inspection.modules)
    if inspection.against and inspection.against.modules:
        yield _error(inspection.against)
    if inspection.deep and inspection.deep.modules:
        yield _saturation(inspection.deep)


def _bits(modules: Sequence[Module]) -> Measure:
    return Measure(
        title="Bits per weight",
        note="Stored bits with the share of scales and zero points.",
        values={module.name: module.bits_per_weight for module in modules},
        low=2,
        high=16,
        cell_text="{:.2f}".format,
        legend_text="{:.1f} bits".format,
        scale=log2,
    )


def _error(against: Comparison) -> Measure:
    decibels = {
        module.name: math.inf if module.sqnr_db is None else module.sqnr_db
        for module in against.modules
    }
    finite = [value for value in decibels.values() if math.isfinite(value)] or [0.0]
    return Measure(
        title="Error",
        note=(
            f"Signal to quantization noise against {short(against.base)}. Lower is worse and has "
            "a stronger colour; = marks equal weights."
        ),
        values=decibels,
        low=max(max(finite), min(finite) + MIN_DB_RANGE),
        high=min(finite),
        cell_text=lambda value: "=" if value == math.inf else f"{value:.1f}",
        legend_text="{:.0f} dB".format,
    )


def _saturation(deep: DeepReport) -> Measure:
    shares = {module.name: module.saturated for module in deep.modules}
    return Measure(
        title="Saturation",
        note="Share of the codes at either end of the format's range, in percent.",
        values=shares,
        low=0,
        high=max([0.01, *(value for value in shares.values() if math.isfinite(value))]),
        cell_text=lambda value: f"{value * 100:.1f}",
        legend_text="{:.1%}".format,
    )


@dataclass(frozen=True)
class _Columns:
    """The columns of a heat map; layers share one when there are more than `MAX_COLUMNS`."""

    layers: list[int]

    @property
    def width(self) -> int:
        """How many layers share a column."""
        return max(math.ceil(len(self.layers) / MAX_COLUMNS), 1)

    @property
    def firsts(self) -> list[int]:
        """The first layer of each column."""
        return self.layers[:: self.width]

    @property
    def label_every(self) -> int:
        """Only every so many columns have a heading."""
        count = len(self.firsts)
        return 1 if count <= 32 else math.ceil(count / 20)

    def where(self, column: int | None) -> str:
        """Return which layers ``column`` stands for, in words."""
        if column is None:
            return "outside the layers"
        first = self.firsts[column]
        return f"layer {first}" if self.width == 1 else f"layers from {first}"


@dataclass(frozen=True)
class _Grid:
    """The modules of a heat map by row label and column; column None is outside the layers."""

    measure: Measure
    details: ModuleDetails
    columns: _Columns
    members: Mapping[str, Mapping[int | None, list[Module]]]

    def row(self, label: str) -> list[Cell | None]:
        return [self.cell(label, column) for column in range(len(self.columns.firsts))]

    def cell(self, label: str, column: int | None) -> Cell | None:
        members = self.members[label].get(column)
        if not members:
            return None
        shared = self.columns.width > 1
        return _cell(
            self.measure,
            self.details,
            members,
            where=f"{label}, {self.columns.where(column)}",
            words=label if shared else f"{_layer_part(members[0])} {label}".strip(),
        )


def _heat_map(measure: Measure, details: ModuleDetails) -> HeatMap:
    modules = [module for module in details.modules if module.name in measure.values]
    columns = _Columns(sorted({module.layer for module in modules if module.layer is not None}))
    members = _members(modules, columns)
    grid = _Grid(measure, details, columns, members)
    labels = sorted(members, key=row_rank)
    longest = max(map(len, labels), default=0)
    return HeatMap(
        measure=measure,
        label_rem=min(max(longest * 0.5 + 0.75, 6), 12),
        columns=[str(layer) for layer in columns.firsts],
        label_every=columns.label_every,
        rows=[(label, grid.row(label)) for label in labels if set(members[label]) != {None}],
        outside=[(label, grid.cell(label, None)) for label in labels if None in members[label]],
    )


def _members(
    modules: Sequence[Module], columns: _Columns
) -> dict[str, dict[int | None, list[Module]]]:
    """Return the modules by row label and column; column None is outside the layers."""
    labels = row_labels(modules)
    column_of: dict[int | None, int | None] = {
        layer: index // columns.width for index, layer in enumerate(columns.layers)
    }
    column_of[None] = None
    members: dict[str, dict[int | None, list[Module]]] = {}
    for module in modules:
        row = members.setdefault(labels[module.name], {})
        row.setdefault(column_of[module.layer], []).append(module)
    return members


def _cell(
    measure: Measure, details: ModuleDetails, members: Sequence[Module], *, where: str, words: str
) -> Cell:
    values = [measure.values[module.name] for module in members]
    finite = [value for value in values if math.isfinite(value)]
    mean = sum(finite) / len(finite) if finite else values[0]
    worst = max(members, key=lambda module: measure.shade(measure.values[module.name]))
    lines = details.describe(worst)
    if len(members) > 1:
        worst_text = measure.text(measure.values[worst.name])
        size = sum(module.size_bytes for module in members)
        counts = Counter(map(stored_as, members)).most_common(4)
        lines = [
            f"{where}: {len(members):,} modules",
            ", ".join(f"{scheme} × {count}" for scheme, count in counts),
            f"{format_size(size)}, mean {measure.text(mean)}, worst {worst_text}",
            "",
            f"worst: {lines[0]}",
            *lines[1:],
        ]
    return Cell(measure.text(mean), measure.step(mean), "\n".join(lines), words)


def _layer_part(module: Module) -> str:
    """Return the part of a name that gives its layer, e.g. ``layers.7.``; else an empty string."""
    start, number, _ = module.name.partition(f".{module.layer}.")
    return f"{start.rpartition('.')[2]}{number}" if number else ""


def palette(stops: Sequence[str]) -> list[tuple[str, str]]:
    """Return the colours between ``stops``, each with the colour of text on it."""
    colours = [_channels(stop) for stop in stops]
    found = []
    for step in range(STEPS):
        whole, part = divmod(step * (len(stops) - 1) / (STEPS - 1), 1)
        low = colours[int(whole)]
        high = colours[min(int(whole) + 1, len(stops) - 1)]
        red, green, blue = (round(a + (b - a) * part) for a, b in zip(low, high, strict=True))
        luminance = (
            0.2126 * (red / 255) ** 2.2
            + 0.7152 * (green / 255) ** 2.2
            + 0.0722 * (blue / 255) ** 2.2
        )
        text = "#0b1526" if luminance > 0.19 else "#ffffff"
        found.append((f"#{red:02x}{green:02x}{blue:02x}", text))
    return found


def _channels(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
