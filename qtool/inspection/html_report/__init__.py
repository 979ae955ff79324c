"""The report of an inspection as one HTML file that loads nothing from the network."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from qtool import __version__
from qtool.inspection.engines import EngineReport
from qtool.inspection.html_report.details import ModuleDetails
from qtool.inspection.html_report.formatting import (
    decibel_text,
    number_text,
    parameters_text,
    visible,
)
from qtool.inspection.html_report.heat_map import DARK_STOPS, LIGHT_STOPS, heat_maps, palette
from qtool.inspection.html_report.part_costs import part_costs
from qtool.inspection.html_report.scales import scale_histograms
from qtool.inspection.html_report.sizes import size_bars
from qtool.inspection.html_report.tables import (
    embedded_json,
    module_table,
    unquantized_groups,
    worst_layers,
)
from qtool.inspection.report import Inspection
from qtool.sizes import format_size

if TYPE_CHECKING:
    from jinja2 import Environment

FOLDER = Path(__file__).parent
MAX_LISTED = 50  # names of a list that are shown


@dataclass(frozen=True)
class Verdict:
    """Whether the engine loads the checkpoint: ``status`` is good, fair or bad."""

    status: str
    text: str
    where: str
    """Engine, version, GPU and ranks."""


@dataclass(frozen=True)
class LinearShare:
    """How many of the linear layers, and which ``share`` of their weights, are quantized."""

    quantized: int
    all: int
    share: str


@dataclass(frozen=True)
class Error:
    """Signal to quantization noise of the layers that differ from the base, in decibels."""

    median: str
    worst: str


def render_html(inspection: Inspection) -> str:
    """Return ``inspection`` as a complete HTML document.

    Names from the checkpoint are escaped: they are text in the document, never markup.
    """
    from markupsafe import Markup

    details = ModuleDetails.of(inspection)
    html = (
        environment(FOLDER)
        .get_template("report.html")
        .render(
            report=inspection,
            version=__version__,
            css=Markup((FOLDER / "report.css").read_text(encoding="utf-8")),
            js=Markup((FOLDER / "report.js").read_text(encoding="utf-8")),
            palettes={"light": palette(LIGHT_STOPS), "dark": palette(DARK_STOPS)},
            verdict=_verdict(inspection.engine) if inspection.engine else None,
            linear=_linear_share(inspection),
            error=_error(inspection),
            sizes=size_bars(inspection),
            layers=part_costs(inspection.by_layer) if inspection.by_layer else None,
            heat_maps=heat_maps(inspection, details),
            worst=worst_layers(details),
            dead=_layers_with_dead_channels(details),
            histograms=scale_histograms(details),
            unquantized=unquantized_groups(inspection.modules),
            max_listed=MAX_LISTED,
            table=Markup(embedded_json(module_table(details))),
        )
    )
    return encodable(html)


def encodable(html: str) -> str:
    """Return ``html`` as UTF-8 can hold it: a name may have half a surrogate pair."""
    return html.encode("utf-8", "replace").decode("utf-8")


def environment(*folders: Path) -> Environment:
    """Return what renders the templates in ``folders``: texts are escaped, hidden characters
    marked.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    found = Environment(
        loader=FileSystemLoader(folders),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=visible,
    )
    found.filters |= {
        "bytes": format_size,
        "count": "{:,}".format,
        "number": number_text,
        "decibel": decibel_text,
        "parameters": parameters_text,
    }
    return found


def _verdict(engine: EngineReport) -> Verdict:
    gpu = f" on {engine.gpu}" if engine.gpu else ""
    ranks = f", {engine.tensor_parallel} ranks" if engine.tensor_parallel > 1 else ""
    where = f"{engine.engine} {engine.version}{gpu}{ranks}"
    if not engine.loads:
        return Verdict("bad", "refused", where)
    if not engine.native:
        return Verdict("fair", "loads, emulated", where)
    return Verdict("good", "loads", where)


def _linear_share(inspection: Inspection) -> LinearShare:
    quantized = [module for module in inspection.modules if module.scheme]
    weights = sum(module.parameters for module in inspection.modules)
    share = sum(module.parameters for module in quantized) / weights if weights else 0.0
    return LinearShare(
        quantized=len(quantized),
        all=len(inspection.modules),
        share=f"{math.floor(share * 1000) / 10:.1f}%",
    )


def _error(inspection: Inspection) -> Error | None:
    if inspection.against is None:
        return None
    found = [module.sqnr_db for module in inspection.against.modules]
    finite = [value for value in found if value is not None and math.isfinite(value)]
    if not finite:
        return None
    return Error(median=f"{median(finite):.1f}", worst=f"{min(finite):.1f}")


def _layers_with_dead_channels(details: ModuleDetails) -> list[str]:
    return [
        numbers.name
        for numbers in details.numbers.values()
        if numbers.dead_rows or numbers.dead_columns
    ]
