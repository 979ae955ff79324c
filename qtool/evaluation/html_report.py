"""The report of an evaluation as one HTML page that loads nothing from the network."""

from __future__ import annotations

from pathlib import Path

from qtool import __version__
from qtool.evaluation.gate import Measure
from qtool.evaluation.report import Evaluation
from qtool.evaluation.text import interval_text, meaning, number_text
from qtool.inspection.html_report import FOLDER as INSPECTION
from qtool.inspection.html_report.formatting import number_text as short_number
from qtool.inspection.html_report.formatting import visible
from qtool.inspection.html_report.part_costs import HEIGHT, chart_bars, part_costs
from qtool.sizes import format_size

FOLDER = Path(__file__).parent


def render_html(evaluation: Evaluation) -> str:
    """Return ``evaluation`` as a complete HTML document; texts in it are escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader([FOLDER, INSPECTION]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=visible,
    )
    environment.filters |= {
        "bytes": format_size,
        "count": "{:,}".format,
        "number": short_number,
        "spaces": _spaces,
    }
    css = (INSPECTION / "report.css").read_text(encoding="utf-8")
    html = environment.get_template("report.html").render(
        report=evaluation,
        version=__version__,
        css=Markup(css),
        height=HEIGHT,
        measures=[_row(name, each) for name, each in evaluation.measures.items()],
        positions=chart_bars(
            [
                (value, f"from token {start}: {value:.4g} nats")
                for start, value in evaluation.kl_by_position
            ]
        ),
        layers=part_costs(evaluation.by_layer) if evaluation.by_layer else None,
    )
    return html.encode("utf-8", "replace").decode("utf-8")


def _spaces(token: str) -> str:
    """Return ``token`` with signs for what would not be seen."""
    return token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")


def _row(name: str, measure: Measure) -> tuple[str, str, str, str]:
    return name, number_text(name, measure.value), interval_text(name, measure), meaning(name)
