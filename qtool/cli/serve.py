"""`qtool serve`: its options, and which of three things they ask for."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qtool.cli.options import ENVIRONMENT, Debug, Json, Quiet, Verbose, takes
from qtool.cli.output import current, message, show
from qtool.cli.signals import ignore_signals
from qtool.errors import ResourceError, UsageError
from qtool.serve.settings import ServeOptions, ServeSettings, bind, make_settings
from qtool.terminal import printable

if TYPE_CHECKING:
    from qtool.serve.service import Service


# torch.compile has a switch of SGLang's name here
@takes(ServeOptions, without=("compile",), defaults=ServeSettings)
def serve(
    context: typer.Context,
    options: ServeOptions,
    engine: Annotated[str, typer.Option(help="builtin, vllm or sglang.")] = "builtin",
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Show which kernel multiplies each layer, and why not another; serve nothing.",
        ),
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Serve a checkpoint over HTTP, as OpenAI and SGLang do; with --dry-run show how it would run.

    Options with a * are for --engine vllm and sglang, which this process is handed to; what follows
    `--` is theirs.
    """
    if os.environ.get(ENVIRONMENT["api_key"]) == "":  # typer ignores an empty variable
        options = replace(options, api_key=options.api_key or "")
    if options.log_level is None and (quiet or verbose):
        options = replace(options, log_level="warning" if quiet else "debug")
    if engine != "builtin":
        return _hand_over(engine, options, context.args, dry_run=dry_run, as_json=as_json)
    if context.args:
        raise UsageError(
            "E_USAGE",
            f"unexpected arguments: {' '.join(context.args)}",
            hint="--engine vllm and sglang take more, after `--`",
        )
    settings = make_settings(options)
    if dry_run:
        return _show_kernels(settings, as_json=as_json)
    from qtool.serve.backend.engine_child import EngineChild

    address = bind(settings)  # a taken port costs no start of an engine
    with EngineChild(settings) as child:  # imports torch while this process imports the rest
        from qtool.serve.ready import ready_dict, ready_text
        from qtool.serve.server import serve as run

        def ready(service: Service) -> None:
            try:
                show(lambda: ready_dict(service), ready_text(service), as_json)
            except ResourceError as error:
                message(f"warning: {error.message}")

        run(settings, child, address, on_ready=ready)
    ignore_signals()  # everything has ended: a late signal must not turn it into a failure
    if as_json and not current().has_result:
        ended = {"url": settings.url, "model": settings.name, "ready": False}
        show(lambda: ended, "", as_json)


def _hand_over(
    engine: str, options: ServeOptions, extra: list[str], *, dry_run: bool, as_json: bool
) -> None:
    from qtool.serve.handover import hand_over, prepare

    command = prepare(engine, options, extra, dry_run=dry_run)
    for warning in command.warnings:
        message(f"warning: {warning}")
    if dry_run:
        return show(command.to_dict, printable(str(command)), as_json)
    message(str(command))
    hand_over(command)


def _show_kernels(settings: ServeSettings, *, as_json: bool) -> None:
    from qtool.checkpoint import open_checkpoint, resolve_model
    from qtool.cli.tables import kernels
    from qtool.engine.start import decide_start, plan_engine
    from qtool.serve.service import check_templates

    checkpoint = open_checkpoint(resolve_model(settings.model_path, revision=settings.revision))
    plan = plan_engine(checkpoint, settings.engine_config)
    tokenizer = decide_start(plan, settings.engine_config).tokenizer
    folder = Path(tokenizer.name_or_path if tokenizer else checkpoint.path)
    asyncio.run(check_templates(settings, folder, plan.encoding))
    for warning in plan.warnings:
        message(f"warning: {warning}")
    show(plan.to_dict, kernels(plan), as_json)
