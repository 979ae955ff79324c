"""`qtool inspect`: its options."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qtool.cli.files import check_writable, write_file
from qtool.cli.options import (
    Debug,
    HtmlReport,
    Json,
    ModelPath,
    Quiet,
    Revision,
    Verbose,
)
from qtool.cli.output import show
from qtool.errors import UsageError

if TYPE_CHECKING:
    from qtool.inspection import Inspection


def inspect(
    model_path: ModelPath,
    modules: Annotated[
        bool, typer.Option("--modules", help="Show every linear layer, as a tree.")
    ] = False,
    deep: Annotated[
        bool,
        typer.Option(
            "--deep",
            help="Read all data: saturation, dead channels, scales; 3 when it is damaged.",
        ),
    ] = False,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Compare every file with the manifest; 3 when one differs."),
    ] = False,
    against: Annotated[
        str | None,
        typer.Option(
            help="Compare each layer with this checkpoint's, worst first.", show_default=False
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            help="Will it load there? vllm, sglang, tensorrt-llm or transformers.",
            show_default=False,
        ),
    ] = None,
    engine_version: Annotated[
        str | None,
        typer.Option(help="The engine's version. [that of the rules]", show_default=False),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(help="Architecture or card, e.g. sm_90 or h100.", show_default=False),
    ] = None,
    tensor_parallel: Annotated[
        int, typer.Option("--tp", "--tensor-parallel", help="GPUs that share each layer.")
    ] = 1,
    html: HtmlReport = None,
    revision: Revision = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Show what a checkpoint holds, whether its numbers are sound, and where it will load; exit
    code 3 when it will not, or when it is damaged.
    """
    from qtool.checkpoint import open_checkpoint, resolve_model
    from qtool.inspection import inspect as run
    from qtool.inspection import render

    # the objects of a large checkpoint are many, none is garbage, and the process ends soon
    gc.disable()
    if engine is None:
        _check_unused(engine_version, gpu, tensor_parallel)
    if html:
        check_writable(html)
    folder = resolve_model(model_path, revision=revision)
    found = run(
        open_checkpoint(folder),
        deep=deep,
        verify=verify,
        against=open_checkpoint(resolve_model(against)) if against else None,
        engine=engine,
        engine_version=engine_version,
        gpu=gpu,
        tensor_parallel=tensor_parallel,
    )
    if html:
        _write_html_report(html, found)
    show(found.to_dict, render(found, modules=modules), as_json)
    _check_damage(found, folder)
    if found.engine and not found.engine.loads:
        raise typer.Exit(3)


def _check_damage(found: Inspection, folder: Path) -> None:
    """Raise CheckpointRefused when the data of ``folder`` is damaged, or its files are not those
    of its manifest; the list of damage has been shown.
    """
    if found.bad_values:
        from qtool.formats import damaged

        more = f" (and {len(found.damage) - 1:,} more)" if found.damage[1:] else ""
        raise damaged(f"{found.bad_values[0]}{more}")
    if found.manifest and not found.manifest.matches:
        raise found.manifest.refusal(folder)


def _write_html_report(html: Path, found: Inspection) -> None:
    from qtool.inspection.html_report import render_html

    write_file(html, render_html(found))


def _check_unused(engine_version: str | None, gpu: str | None, tensor_parallel: int) -> None:
    if engine_version or gpu or tensor_parallel != 1:
        raise UsageError(
            "E_NO_ENGINE",
            "--engine-version, --gpu and --tp need an engine",
            hint="add --engine vllm",
        )
