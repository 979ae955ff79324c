"""`qtool eval`: its options, and where its reports go."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from qtool.cli.files import check_writable, write_file
from qtool.cli.options import Debug, HtmlReport, Json, ModelPath, Quiet, Verbose, takes
from qtool.cli.output import message, show
from qtool.errors import GateFailed, file_errors
from qtool.memory import no_collection
from qtool.options import EvalOptions, no_gate

SUMMARY_VARIABLE = "GITHUB_STEP_SUMMARY"


@takes(EvalOptions)
def evaluate(
    options: EvalOptions,
    model_path: ModelPath,
    junit: Annotated[
        Path | None,
        typer.Option(help="Write the gate to this file, as JUnit's XML.", show_default=False),
    ] = None,
    html: HtmlReport = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Compare a quantized checkpoint with its 16-bit reference; exit code 7 when a limit of the
    gate does not hold.
    """
    with no_collection(keep=True):
        from qtool.cli.progress import progress
        from qtool.evaluation import text
        from qtool.evaluation.execution import run_evaluation
        from qtool.evaluation.html_report import render_html

    if junit and not options.gate:
        raise no_gate("--junit")
    summary = os.environ.get(SUMMARY_VARIABLE)
    for file in filter(None, (junit, html, Path(summary) if summary else None)):
        check_writable(file)
    with progress(quiet=quiet, verbose=verbose) as on_event:
        found = run_evaluation(model_path, options, on_event=on_event)
    if junit:
        write_file(junit, text.junit(found))
    if html:
        write_file(html, render_html(found))
    if summary:
        _write_summary(Path(summary), text.markdown(found))
    show(found.to_dict, text.render(found), as_json)
    if found.failed:
        more = f" and {len(found.failed) - 1} more" if found.failed[1:] else ""
        raise GateFailed(
            "E_GATE_FAILED",
            f"{model_path}: {found.failed[0]}{more}",
            hint="the report names the texts where the models differ most",
        )


def _write_summary(path: Path, text: str) -> None:
    """Add ``text`` to the summary of a GitHub job."""
    with file_errors(), path.open("a", encoding="utf-8") as file:
        file.write(text)
    message(f"the summary of the job is in {path}")
