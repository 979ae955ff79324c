"""`qtool quantize`: its options, and the methods and plans it shows."""

from __future__ import annotations

from typing import Annotated

import typer

from qtool.cli.options import Debug, Json, ModelPath, Quiet, Verbose, takes
from qtool.cli.output import show
from qtool.errors import UsageError
from qtool.options import QuantizeOptions


@takes(QuantizeOptions)
def quantize(
    options: QuantizeOptions,
    model_path: ModelPath = "",
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show what would be done and what it costs; write nothing."),
    ] = False,
    list_methods: Annotated[bool, typer.Option("--list", help="Show the methods.")] = False,
    all_methods: Annotated[
        bool, typer.Option("--all", help="With --list: the experimental methods too.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Quantize a model by METHOD and write the checkpoint to OUTPUT."""
    from qtool.cli import tables

    if list_methods:
        return show(lambda: tables.methods_dict(all_methods), tables.methods(all_methods), as_json)
    from qtool.checkpoint import open_checkpoint
    from qtool.cli.progress import progress
    from qtool.evaluation.gated import check_request, run_gated
    from qtool.inspection.engines import check_engines, shown_verdicts, verdicts_dict
    from qtool.quantization import prepare

    if not model_path:
        raise UsageError(
            "E_NO_MODEL",
            "--model-path is missing",
            hint="a checkpoint folder or a Hub name such as `org/model`",
        )
    request = prepare(model_path, options, need_data=not dry_run)
    check_request(request)
    if dry_run:
        return show(request.to_dict, tables.plan(request), as_json)
    with progress(quiet=quiet, verbose=verbose) as on_event:
        result = run_gated(request, on_event=on_event)
    reports = check_engines(open_checkpoint(result.output))
    show(
        lambda: {**result.to_dict(), "engines": verdicts_dict(reports)},
        f"{result.summary()}\n{shown_verdicts(reports)}",
        as_json,
    )
