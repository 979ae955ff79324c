"""The report of an evaluation as one HTML page that loads nothing from the network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qtool import __version__
from qtool.evaluation.gate import Measure
from qtool.evaluation.report import Evaluation, PartCost
from qtool.evaluation.text import interval_text, meaning, number_text
from qtool.inspection.html_report import FOLDER as INSPECTION
from qtool.inspection.html_report.formatting import visible
from qtool.sizes import format_size

FOLDER = Path(__file__).parent
HEIGHT = 100.0  # of a chart's drawing
MAX_PARTS = 400  # bars of a chart


@dataclass(frozen=True)
class Bar:
    """One bar of a chart."""

    x: float
    width: float
    """In percent of the chart's width."""

    height: float
    """Of `HEIGHT`."""

    tip: str


def render_html(evaluation: Evaluation) -> str:
    """Return ``evaluation`` as a complete HTML document; texts in it are escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=visible,
    )
    environment.filters |= {"bytes": format_size, "count": "{:,}".format}
    css = (INSPECTION / "report.css").read_text(encoding="utf-8")
    html = environment.get_template("report.html").render(
        report=evaluation,
        version=__version__,
        css=Markup(css),
        height=HEIGHT,
        measures=[_row(name, each) for name, each in evaluation.measures.items()],
        positions=_bars(
            [
                (value, f"from token {start}: {value:.4g} nats")
                for start, value in evaluation.kl_by_position
            ]
        ),
        layers=_bars([_layer(each) for each in in_model_order(evaluation.by_layer)]),
        worst_layers=evaluation.by_layer[:10],
    )
    return html.encode("utf-8", "replace").decode("utf-8")


def in_model_order(costs: Sequence[PartCost]) -> list[PartCost]:
    """Return the parts as they follow each other in the model."""
    return sorted(
        costs[:MAX_PARTS],
        key=lambda each: [
            (0, int(word), "") if word.isdigit() else (1, 0, word) for word in each.part.split(".")
        ],
    )


def _row(name: str, measure: Measure) -> tuple[str, str, str, str]:
    return name, number_text(name, measure.value), interval_text(name, measure), meaning(name)


def _layer(cost: PartCost) -> tuple[float, str]:
    return cost.mean_kl, f"{cost.part} ({', '.join(cost.schemes)}): {cost.mean_kl:.4g} nats"


def _bars(values: Sequence[tuple[float, str]]) -> list[Bar]:
    """Return a bar for each value; the highest fills the chart."""
    finite = [value for value, _ in values if math.isfinite(value)]
    highest = max(finite, default=0.0) or 1.0
    width = 100 / len(values) if values else 0.0
    return [
        Bar(
            x=number * width,
            width=width * 0.86,
            height=HEIGHT * (min(value / highest, 1) if math.isfinite(value) else 1),
            tip=tip,
        )
        for number, (value, tip) in enumerate(values)
    ]
