"""The report of an inspection as one HTML page that loads nothing from anywhere: what people look
at, and read when they want the number.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from qtool import __version__
from qtool.inspection.comparison import Difference
from qtool.inspection.deep import ModuleNumbers
from qtool.inspection.report import Inspection, Module, Row
from qtool.plan import OTHER_TOWERS

HERE = Path(__file__).parent
STEPS = 20  # colours of a heat map
MAX_COLUMNS = 256  # more layers than that share columns
MAX_ROWS = 32  # more kinds than that share a row: a page stays small whatever the names are
MAX_LISTED = 50  # names in a list that nobody reads to its end
WORST = 15
HIDDEN = dict.fromkeys(
    (
        *range(9),
        *range(11, 32),
        127,
        0x200E,
        0x200F,
        0x2028,
        0x2029,
        *range(0x202A, 0x202F),
        *range(0x2066, 0x206A),
    ),
    "\ufffd",
)
USUAL_ORDER = (
    *(
        "q_proj",
        "k_proj",
        "v_proj",
        "qkv_proj",
        "o_proj",
        "q_a_proj",
        "q_b_proj",
        "kv_a_proj_with_mqa",
        "kv_b_proj",
    ),
    *("gate", "gate_proj", "up_proj", "gate_up_proj", "down_proj", "w1", "w3", "w2", "fc1", "fc2"),
)
# ColorBrewer's YlGnBu, safe for colour-blind eyes since lightness alone orders it. On a dark page
# the order turns round: more is always further
# from the paper.
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


def render_page(inspection: Inspection) -> str:
    """Return ``inspection`` as a complete HTML document; names from the checkpoint are text in it,
    never markup.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_visible,
    )
    environment.filters |= {
        "bytes": bytes_text,
        "count": "{:,}".format,
        "number": number_text,
        "decibel": decibel_text,
        "parameters": parameters_text,
    }
    facts = _Facts.of(inspection)
    page = environment.get_template("html_report.html").render(
        report=inspection,
        version=__version__,
        css=Markup((HERE / "html_report.css").read_text(encoding="utf-8")),
        js=Markup((HERE / "html_report.js").read_text(encoding="utf-8")),
        palettes={"light": _palette(LIGHT_STOPS), "dark": _palette(DARK_STOPS)},
        verdict=_verdict(inspection),
        linear=_linear_share(inspection),
        error=_error(inspection),
        sizes=_sizes(inspection),
        heat_maps=[_heat_map(measure, facts) for measure in _measures(inspection)],
        worst=_worst(facts),
        dead=[
            numbers.name
            for numbers in facts.numbers.values()
            if numbers.dead_rows or numbers.dead_columns
        ],
        histograms=_histograms(facts),
        left=_left_in_16_bits(inspection.modules),
        max_listed=MAX_LISTED,
        table=Markup(_embedded(_module_table(facts))),
    )
    # a name may hold half a surrogate pair, which no file can
    return page.encode("utf-8", "replace").decode("utf-8")


def bytes_text(size: float) -> str:
    """Return ``size`` bytes in the unit that leaves one to three digits before the point: ``3.94
    GB``.
    """
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(size) >= scale:
            return f"{size / scale:.{2 if size < 10 * scale else 1}f} {unit}"
    return f"{size:.0f} B"


def parameters_text(count: int) -> str:
    """Return a number of parameters as models are called: ``8.03 B``."""
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.{2 if count < 100 * scale else 1}f} {unit}"
    return str(count)


def number_text(value: float) -> str:
    """Return ``value`` with three significant digits."""
    return "NaN" if math.isnan(value) else f"{value:.3g}"


def decibel_text(value: float | None) -> str:
    """Return a ratio in decibels; None and infinity stand for layers that are equal."""
    if value is None or value == math.inf:
        return "equal"
    return "NaN" if math.isnan(value) else f"{value:.1f} dB"


@dataclass(frozen=True)
class _Facts:
    """The modules, and what is known of each beyond its header, by name."""

    modules: tuple[Module, ...]
    differences: Mapping[str, Difference]
    numbers: Mapping[str, ModuleNumbers]

    @classmethod
    def of(cls, inspection: Inspection) -> _Facts:
        differences = (
            {module.name: module for module in inspection.against.modules}
            if inspection.against
            else {}
        )
        numbers = (
            {module.name: module for module in inspection.deep.modules} if inspection.deep else {}
        )
        return cls(inspection.modules, differences, numbers)

    def describe(self, module: Module) -> list[str]:
        """Return the lines of one module's tooltip, its name first."""
        lines = [
            _short(module.name),
            f"{_stored_as(module)}, {module.shape[0]:,} × {module.shape[1]:,}",
            f"{bytes_text(module.size_bytes)}, {module.bits_per_weight:.2f} bits per weight",
        ]
        if difference := self.differences.get(module.name):
            undone = ", after undoing a rescaling" if difference.rescaled else ""
            lines.append(
                f"SQNR {decibel_text(difference.sqnr_db)}, largest error "
                f"{number_text(difference.max_error)}{undone}"
            )
        if numbers := self.numbers.get(module.name):
            lines.append(
                f"{numbers.saturated:.2%} saturated, scales {number_text(numbers.scale_min)} to "
                f"{number_text(numbers.scale_max)}"
            )
            if numbers.dead_rows or numbers.dead_columns:
                lines.append(
                    f"{numbers.dead_rows:,} dead outputs, {numbers.dead_columns:,} dead inputs"
                )
        return lines


@dataclass(frozen=True)
class _Measure:
    """A number of each module that a heat map paints: ``low`` is nearest to the paper's colour,
    ``high`` furthest from it.
    """

    title: str
    note: str
    values: Mapping[str, float]
    low: float
    high: float
    field: Callable[[float], str]
    legend: Callable[[float], str]
    scale: Callable[[float], float] = float

    def text(self, value: float) -> str:
        """Return ``value`` as a field of the map shows it."""
        return "NaN" if math.isnan(value) else self.field(value)

    def shade(self, value: float) -> float:
        """Return where ``value`` lies from ``low``, 0, to ``high``, 1; what is no number is as bad
        as it gets.
        """
        if math.isnan(value):
            return 1.0
        low, high = self.scale(self.low), self.scale(self.high)
        return min(max((self.scale(value) - low) / (high - low), 0.0), 1.0)

    def step(self, value: float) -> int:
        """Return the colour of ``value``."""
        return min(int(self.shade(value) * STEPS), STEPS - 1)

    def ticks(self) -> list[str]:
        """Return the labels of the legend: both ends and the middle."""
        middle = (
            math.sqrt(self.low * self.high) if self.scale is _log2 else (self.low + self.high) / 2
        )
        return [self.legend(value) for value in (self.low, middle, self.high)]


def _measures(inspection: Inspection) -> Iterator[_Measure]:
    if not inspection.modules:
        return
    bits = {module.name: module.bits_per_weight for module in inspection.modules}
    yield _Measure(
        "Bits per weight",
        "Stored bits with the share of scales and zero points.",
        bits,
        2,
        16,
        "{:.2f}".format,
        "{:.1f} bits".format,
        _log2,
    )
    if inspection.against and inspection.against.modules:
        decibels = {
            module.name: math.inf if module.sqnr_db is None else module.sqnr_db
            for module in inspection.against.modules
        }
        finite = [value for value in decibels.values() if math.isfinite(value)] or [0.0]
        note = (
            f"Signal to quantization noise against {_short(inspection.against.base)}. Lower is "
            "worse and painted stronger; = marks equal weights."
        )
        # ten decibels at least, or noise would look like a finding
        best = max(max(finite), min(finite) + 10)
        yield _Measure(
            "Error",
            note,
            decibels,
            best,
            min(finite),
            lambda value: "=" if value == math.inf else f"{value:.1f}",
            "{:.0f} dB".format,
        )
    if inspection.deep and inspection.deep.modules:
        shares = {module.name: module.saturated for module in inspection.deep.modules}
        most = max([0.01, *(value for value in shares.values() if math.isfinite(value))])
        note = "Share of the codes at either end of the format's range, in percent."
        yield _Measure(
            "Saturation", note, shares, 0, most, lambda value: f"{value * 100:.1f}", "{:.1%}".format
        )


@dataclass(frozen=True)
class _Cell:
    """One field of a heat map. ``filter`` finds its modules in the list of all."""

    text: str
    step: int
    tip: str
    filter: str


def _heat_map(measure: _Measure, facts: _Facts) -> dict[str, Any]:
    """Return what the template paints: a row for each kind, a column for each layer, and apart from
    them the modules that are in no layer.
    """
    modules = [module for module in facts.modules if module.name in measure.values]
    labels = _row_labels(modules)
    layers = sorted({module.layer for module in modules if module.layer is not None})
    width = max(math.ceil(len(layers) / MAX_COLUMNS), 1)  # layers that share a column
    column_of = {layer: index // width for index, layer in enumerate(layers)}
    found: dict[str, dict[int | None, list[Module]]] = {}
    for module in modules:
        label, column = (
            labels[module.name],
            None if module.layer is None else column_of[module.layer],
        )
        found.setdefault(label, {}).setdefault(column, []).append(module)
    firsts = layers[::width]
    order = sorted(found, key=_row_rank)

    def cell(label: str, column: int | None) -> _Cell | None:
        members = found[label].get(column)
        if not members:
            return None
        place = (
            "outside the layers"
            if column is None
            else f"layer {firsts[column]}"
            if width == 1
            else f"layers from {firsts[column]}"
        )
        words = label if width > 1 else f"{_layer_part(members[0])} {label}".strip()
        return _cell(measure, facts, members, f"{label}, {place}", words)

    return {
        "measure": measure,
        "label_rem": min(max(max(map(len, order), default=0) * 0.5 + 0.75, 6), 12),
        "columns": [str(layer) for layer in firsts],
        "label_every": max(math.ceil(len(firsts) / 32), 1)
        if len(firsts) <= 32
        else math.ceil(len(firsts) / 20),
        "rows": [
            (label, [cell(label, column) for column in range(len(firsts))])
            for label in order
            if set(found[label]) != {None}
        ],
        "outside": [(label, cell(label, None)) for label in order if None in found[label]],
    }


def _cell(
    measure: _Measure, facts: _Facts, members: Sequence[Module], place: str, words: str
) -> _Cell:
    values = [measure.values[module.name] for module in members]
    finite = [value for value in values if math.isfinite(value)]
    mean = sum(finite) / len(finite) if finite else values[0]
    worst = max(members, key=lambda module: measure.shade(measure.values[module.name]))
    worst_text = measure.text(measure.values[worst.name])
    lines = facts.describe(worst)
    if len(members) > 1:
        schemes = ", ".join(
            f"{scheme} × {count}"
            for scheme, count in Counter(map(_stored_as, members)).most_common(4)
        )
        together = (
            f"{bytes_text(sum(module.size_bytes for module in members))}, mean "
            f"{measure.text(mean)}, worst {worst_text}"
        )
        lines = [
            f"{place}: {len(members):,} modules",
            schemes,
            together,
            "",
            f"worst: {lines[0]}",
            *lines[1:],
        ]
    return _Cell(measure.text(mean), measure.step(mean), "\n".join(lines), words)


def _row_labels(modules: Sequence[Module]) -> dict[str, str]:
    """Return the row of each module: its kind, told apart by tower and by kind of expert; the
    rarest share a row when they are too many.
    """
    labels = {module.name: _row_label(module) for module in modules}
    common = {label for label, _ in Counter(labels.values()).most_common(MAX_ROWS)}
    return {name: label if label in common else "others" for name, label in labels.items()}


def _row_label(module: Module) -> str:
    parents = module.name.split(".")[:-1]
    tower = next((part for part in parents if part in OTHER_TOWERS), "")
    expert = next((part for part in parents if "expert" in part), "")
    return _short(" ".join(filter(None, (tower, expert, module.kind))), 40)


def _layer_part(module: Module) -> str:
    """Return the part of a name that says its layer, as ``layers.7.``; empty outside the layers."""
    start, number, _ = module.name.partition(f".{module.layer}.")
    return f"{start.rpartition('.')[2]}{number}" if number else ""


def _row_rank(label: str) -> tuple[int, int, str]:
    *where, kind = label.split(" ")
    return len(where), USUAL_ORDER.index(kind) if kind in USUAL_ORDER else len(USUAL_ORDER), label


def _verdict(inspection: Inspection) -> dict[str, str] | None:
    engine = inspection.engine
    if engine is None:
        return None
    status, text = ("good", "loads") if engine.native else ("fair", "loads, emulated")
    if not engine.loads:
        status, text = "bad", "refused"
    ranks = f", {engine.tensor_parallel} ranks" if engine.tensor_parallel > 1 else ""
    return {
        "status": status,
        "text": text,
        "where": (
            f"{engine.engine} {engine.version}{f' on {engine.gpu}' if engine.gpu else ''}{ranks}"
        ),
    }


def _linear_share(inspection: Inspection) -> dict[str, Any]:
    """Return how many of the linear layers, and of their weights, are quantized."""
    quantized = [module for module in inspection.modules if module.scheme]
    weights = sum(module.parameters for module in inspection.modules)
    share = sum(module.parameters for module in quantized) / weights if weights else 0.0
    return {
        "quantized": len(quantized),
        "all": len(inspection.modules),
        "share": f"{math.floor(share * 1000) / 10:.1f}%",
    }


def _error(inspection: Inspection) -> dict[str, str] | None:
    """Return the median and the worst signal to noise ratio of the layers that differ."""
    differing = (
        [one.sqnr_db for one in inspection.against.modules if one.sqnr_db is not None]
        if inspection.against
        else []
    )
    finite = [value for value in differing if math.isfinite(value)]
    return {"median": f"{median(finite):.1f}", "worst": f"{min(finite):.1f}"} if finite else None


def _sizes(inspection: Inspection) -> dict[str, Any]:
    """Return the parts of both bars: how the bytes now, and in 16 bits, divide among the schemes
    and what is not quantized.
    """
    parts: dict[str, list[Row]] = {}
    for row in inspection.quantized:
        parts.setdefault(row.scheme, []).append(row)
    schemes = len(parts)
    for row in inspection.plain:
        parts.setdefault(
            f"{row.scheme}, not quantized" if row.parameters else "scales and other tensors", []
        ).append(row)
    found = [
        (
            name,
            sum(row.count for row in rows),
            2 * sum(row.parameters for row in rows),
            sum(row.size_bytes for row in rows),
        )
        for name, rows in parts.items()
    ]
    found = [*found[:7], *_merged(found[7:])]
    rest = inspection.size_bytes - sum(part[3] for part in found)
    if rest > 0:
        found.append(("file headers and padding", 0, 0, rest))
    longest = max(inspection.plain_bytes, inspection.size_bytes, 1)
    return {
        "parts": [
            {
                **{
                    "index": index,
                    "name": name,
                    "count": count,
                    "before": before,
                    "after": after,
                    "bits": 16 * after / before if before else None,
                },
                **{
                    "before_width": 100 * before / longest,
                    "after_width": 100 * after / longest,
                    "quantized": index < schemes,
                },
            }
            for index, (name, count, before, after) in enumerate(found)
        ],
        **_ratio(inspection.plain_bytes, inspection.size_bytes),
    }


def _ratio(before: int, after: int) -> dict[str, str]:
    if not before or not after:
        return {"ratio": "–", "ratio_unit": ""}
    if abs(before - after) < 0.005 * before:
        return {"ratio": "same size", "ratio_unit": ""}
    smaller = before > after
    return {
        "ratio": f"{before / after if smaller else after / before:.2f}",
        "ratio_unit": "× smaller" if smaller else "× larger",
    }


def _merged(parts: Sequence[tuple[str, int, int, int]]) -> list[tuple[str, int, int, int]]:
    return (
        [
            (
                "all others",
                sum(part[1] for part in parts),
                sum(part[2] for part in parts),
                sum(part[3] for part in parts),
            )
        ]
        if parts
        else []
    )


def _worst(facts: _Facts) -> list[dict[str, Any]]:
    """Return the layers furthest from the base, with a bar each: its noise as a share of the
    signal, on the scale of the worst.
    """
    modules = {module.name: module for module in facts.modules}
    differing = [
        one
        for one in facts.differences.values()
        if one.sqnr_db is not None and one.sqnr_db != math.inf
    ][:WORST]
    noise = [
        1.0 if math.isnan(one.sqnr_db or 0) else min(10 ** (-(one.sqnr_db or 0) / 20), 1.0)
        for one in differing
    ]
    most = max(noise, default=0) or 1.0
    return [
        {
            "difference": one,
            "module": modules.get(one.name),
            "width": 100 * share / most,
            "noise": decibel_text(one.sqnr_db) if one.sqnr_db != one.sqnr_db else f"{share:.2%}",
        }
        for one, share in zip(differing, noise, strict=True)
    ]


def _histograms(facts: _Facts) -> dict[str, Any] | None:
    """Return how the scales of each kind are spread, one bin for each power of two, all kinds on
    the same axis.
    """
    modules = [module for module in facts.modules if module.name in facts.numbers]
    labels = _row_labels(modules)
    bins: dict[str, Counter[int]] = {}
    ends: dict[str, list[float]] = {}
    for module in modules:
        numbers = facts.numbers[module.name]
        label = labels[module.name]
        bins.setdefault(label, Counter()).update(
            {exponent: count for exponent, count in numbers.scale_histogram if count > 0}
        )
        ends.setdefault(label, []).extend(
            value for value in (numbers.scale_min, numbers.scale_max) if math.isfinite(value)
        )
    exponents = sorted({exponent for counts in bins.values() for exponent in counts})
    if not exponents:
        return None
    first, last = exponents[0], exponents[-1]
    span = last - first + 1

    def position(value: float) -> float | None:
        return min(max(100 * (_log2(value) - first) / span, 0.0), 100.0) if value > 0 else None

    charts = []
    for label in sorted(bins, key=_row_rank):
        counts, low, high = (
            bins[label],
            min(ends[label], default=math.nan),
            max(ends[label], default=math.nan),
        )
        most = max(counts.values(), default=1)
        bars = [
            {
                "x": 100 * (exponent - first) / span,
                "height": max(100 * count / most, 1.5),
                "tip": f"2^{exponent} to 2^{exponent + 1}: {count:,} scales",
            }
            for exponent, count in sorted(counts.items())
        ]
        charts.append(
            {
                "label": label,
                "bars": bars,
                "total": sum(counts.values()),
                "low": low,
                "high": high,
                "at": (position(low), position(high)),
            }
        )
    return {
        "charts": charts,
        "first": first,
        "middle": first + span // 2,
        "last": last + 1,
        "bar_width": 100 / span,
    }


def _left_in_16_bits(modules: Iterable[Module]) -> list[dict[str, Any]]:
    """Return the linear layers without a scheme, by kind and reason, the largest first."""
    groups: dict[tuple[str, str], list[Module]] = {}
    for module in modules:
        if module.scheme is None:
            groups.setdefault((_row_label(module), module.reason), []).append(module)
    found = [
        {
            "kind": kind,
            "reason": reason,
            "count": len(members),
            "size": sum(module.size_bytes for module in members),
            "example": members[0].name,
        }
        for (kind, reason), members in groups.items()
    ]
    return sorted(found, key=lambda group: -int(str(group["size"])))


def _module_table(facts: _Facts) -> dict[str, Any]:
    """Return the list of all modules: columns as [title, format], rows as plain values, None where
    nothing is known.
    """
    columns = [
        ["module", "text"],
        ["stored as", "text"],
        ["outputs", "count"],
        ["inputs", "count"],
        ["bytes", "bytes"],
        ["bits per weight", "fixed"],
    ]
    if facts.differences:
        columns += [["SQNR, dB", "fixed"], ["largest error", "number"]]
    if facts.numbers:
        columns += [
            ["saturated", "percent"],
            ["dead outputs", "count"],
            ["dead inputs", "count"],
            ["least scale", "number"],
            ["largest scale", "number"],
        ]
    return {"columns": columns, "rows": [[*_table_row(facts, module)] for module in facts.modules]}


def _table_row(facts: _Facts, module: Module) -> Iterator[Any]:
    yield from (
        _visible(module.name),
        _visible(_stored_as(module)),
        *module.shape,
        module.size_bytes,
        round(module.bits_per_weight, 2),
    )
    if facts.differences:
        difference = facts.differences.get(module.name)
        equal = difference is not None and difference.sqnr_db in (None, math.inf)
        yield from (
            "equal" if equal else _plain_number(difference.sqnr_db if difference else None),
            _plain_number(difference.max_error if difference else None),
        )
    if facts.numbers:
        known = facts.numbers.get(module.name)
        values = (
            (known.saturated, known.dead_rows, known.dead_columns, known.scale_min, known.scale_max)
            if known
            else (None,) * 5
        )
        yield from map(_plain_number, values)


def _plain_number(value: float | None) -> float | str | None:
    """Return ``value`` as JSON can hold it."""
    if value is None or isinstance(value, int):
        return value
    return float(f"{value:.5g}") if math.isfinite(value) else str(value)


def _embedded(data: Mapping[str, Any]) -> str:
    """Return ``data`` as JSON that can stand in a script element: ASCII, and no character that HTML
    knows.
    """
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _stored_as(module: Module) -> str:
    if module.scheme:
        return module.scheme
    return f"not quantized ({module.reason})" if module.reason else "not quantized"


def _visible(value: Any) -> Any:
    """Return ``value``, with a mark in place of every character that would be invisible or turn the
    text around it.
    """
    return value.translate(HIDDEN) if type(value) is str else value


def _short(text: str, length: int = 160) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _log2(value: float) -> float:
    return math.log2(max(value, 2.0**-1074))


def _palette(stops: Sequence[str]) -> list[tuple[str, str]]:
    """Return the colours between ``stops`` and for each the colour of text on it."""
    colours = [tuple(int(stop[at : at + 2], 16) for at in (1, 3, 5)) for stop in stops]
    found = []
    for step in range(STEPS):
        whole, part = divmod(step * (len(stops) - 1) / (STEPS - 1), 1)
        low, high = colours[int(whole)], colours[min(int(whole) + 1, len(stops) - 1)]
        red, green, blue = (round(a + (b - a) * part) for a, b in zip(low, high, strict=True))
        light = (
            0.2126 * (red / 255) ** 2.2
            + 0.7152 * (green / 255) ** 2.2
            + 0.0722 * (blue / 255) ** 2.2
        )
        found.append((f"#{red:02x}{green:02x}{blue:02x}", "#0b1526" if light > 0.19 else "#ffffff"))
    return found
