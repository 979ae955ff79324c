"""The report of an evaluation as one HTML page that loads nothing from the network."""

from __future__ import annotations

from pathlib import Path

from qtool import __version__
from qtool.evaluation.gate import Measure
from qtool.evaluation.report import Evaluation
from qtool.evaluation.text import interval_text, meaning, number_text
from qtool.inspection.html_report import FOLDER as INSPECTION
from qtool.inspection.html_report import encodable, environment
from qtool.inspection.html_report.part_costs import HEIGHT, chart_bars, part_costs

FOLDER = Path(__file__).parent


def render_html(evaluation: Evaluation) -> str:
    """Return ``evaluation`` as a complete HTML document; texts in it are escaped."""
    from markupsafe import Markup

    templates = environment(FOLDER, INSPECTION)
    templates.filters["spaces"] = _spaces
    css = (INSPECTION / "report.css").read_text(encoding="utf-8")
    html = templates.get_template("report.html").render(
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
    return encodable(html)


def _spaces(token: str) -> str:
    """Return ``token`` with signs for what would not be seen."""
    return token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")


def _row(name: str, measure: Measure) -> tuple[str, str, str, str]:
    return name, number_text(name, measure.value), interval_text(name, measure), meaning(name)
