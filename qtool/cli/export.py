"""`qtool export`: its options."""

from __future__ import annotations

from qtool.cli.options import Debug, Json, ModelPath, Quiet, Verbose, takes
from qtool.cli.output import show
from qtool.memory import no_collection
from qtool.options import ExportOptions


@takes(ExportOptions)
def export(
    options: ExportOptions,
    model_path: ModelPath,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Write a quantized checkpoint in another format, or export a saved ModelOpt state; never
    calibrates.
    """
    with no_collection(keep=True):
        from qtool.cli.progress import progress
        from qtool.conversion import run_export

    with progress(quiet=quiet, verbose=verbose) as on_event:
        result = run_export(model_path, options, on_event=on_event)
    show(result.to_dict, result.summary(), as_json)
