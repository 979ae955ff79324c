"""`qtool export`: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qtool.cli.options import (
    Debug,
    Device,
    Json,
    ModelPath,
    Overwrite,
    Quiet,
    RestorePath,
    Revision,
    TrustPickle,
    TrustRemoteCode,
    Verbose,
)
from qtool.cli.output import show


def export(
    model_path: ModelPath,
    output: Annotated[
        Path,
        typer.Option("--output", "--export-dir", "-o", help="Folder to write.", show_default=False),
    ],
    to: Annotated[
        str | None,
        typer.Option(
            help="compressed-tensors, gptq, gptq_v2, awq, modelopt, fp8_block, mxfp4, bf16 or f16.",
            show_default=False,
        ),
    ] = None,
    requantize: Annotated[
        bool, typer.Option("--requantize", help="Round again what the format cannot hold as it is.")
    ] = False,
    scheme: Annotated[
        str | None,
        typer.Option(
            help="What --requantize rounds to, e.g. W4A16. [the nearest]", show_default=False
        ),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Begin a new file before this size.")] = "5GB",
    checkpoint_restore_path: RestorePath = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            "--quantization-method",
            "-m",
            help="How a file of mto.save was made.",
            show_default=False,
        ),
    ] = None,
    device: Device = "auto",
    trust_pickle: TrustPickle = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Write a quantized checkpoint in another format, or export a saved ModelOpt state; never
    calibrates.
    """
    from qtool.cli.progress import progress
    from qtool.conversion import export as run

    with progress(quiet=quiet, verbose=verbose) as on_event:
        result = run(
            model_path,
            output=output,
            to=to,
            requantize=requantize,
            scheme=scheme,
            max_shard_size=max_shard_size,
            checkpoint_restore_path=checkpoint_restore_path,
            method=method,
            device=device,
            overwrite=overwrite,
            trust_pickle=trust_pickle,
            trust_remote_code=trust_remote_code,
            revision=revision,
            on_event=on_event,
        )
    show(result.to_dict, result.summary(), as_json)
