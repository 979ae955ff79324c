"""`qtool quantize`: its options, and the methods and plans it shows."""

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
from qtool.errors import UsageError


def quantize(
    model_path: ModelPath = "",
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            "--quantization-method",
            "-m",
            help="What to do, by name; --list shows them.",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="A recipe file instead of a method.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "--export-dir",
            "-o",
            help="Folder to write. [default: ./MODEL-METHOD]",
            show_default=False,
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="File (.jsonl .json .txt .parquet) or Hub data set NAME[:CONFIG][:SPLIT].",
            show_default=False,
        ),
    ] = None,
    num_samples: Annotated[
        int | None,
        typer.Option(min=1, help="Calibration samples. [recipe: 512]", show_default=False),
    ] = None,
    seq_len: Annotated[
        int | None,
        typer.Option(
            min=16, help="Tokens of a sample, at most. [recipe: 2048]", show_default=False
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Samples in one forward pass; only equal lengths share one. [recipe: 1]",
            show_default=False,
        ),
    ] = None,
    text_column: Annotated[
        str | None, typer.Option(help="The field that holds the text.", show_default=False)
    ] = None,
    pack: Annotated[
        bool | None,
        typer.Option(
            "--pack/--truncate",
            help="Join texts and cut them at SEQ_LEN, or cut each text.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="For shuffling and the library. [recipe: 0]", show_default=False),
    ] = None,
    device: Device = "auto",
    backend: Annotated[
        str | None,
        typer.Option(
            help="llmcompressor, gptqmodel, modelopt or torchao. [recipe]", show_default=False
        ),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            min=-1,
            help="Inputs that share a scale; -1 for one a row. [recipe]",
            show_default=False,
        ),
    ] = None,
    kv_cache: Annotated[
        str | None,
        typer.Option(help="KV cache scales: fp8 or nvfp4. [recipe]", show_default=False),
    ] = None,
    lm_head: Annotated[
        bool | None,
        typer.Option(
            "--lm-head/--no-lm-head",
            help="Quantize the output head too. [recipe: no]",
            show_default=False,
        ),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            help="Leave modules in 16 bits: name, glob or re:REGEX. May repeat.", show_default=False
        ),
    ] = None,
    fast: Annotated[
        bool, typer.Option("--fast", help="Round to nearest instead of the recipe's algorithm.")
    ] = False,
    checkpoint_save_path: Annotated[
        str | None,
        typer.Option(help="ModelOpt: keep the calibrated state here.", show_default=False),
    ] = None,
    checkpoint_restore_path: RestorePath = None,
    trust_pickle: TrustPickle = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
    backend_python: Annotated[
        str | None,
        typer.Option(help="Interpreter whose environment has the library.", show_default=False),
    ] = None,
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
    from qtool.cli.progress import progress
    from qtool.quantization import Options, prepare, run

    if list_methods:
        return show(lambda: tables.methods_dict(all_methods), tables.methods(all_methods), as_json)
    if not model_path:
        raise UsageError(
            "E_NO_MODEL",
            "which model? --model-path is missing",
            hint="a checkpoint folder or a Hub name such as `org/model`",
        )
    options: Options = {
        "method": method,
        "recipe": recipe,
        "backend": backend,
        "output": output,
        "overwrite": overwrite,
        "calibration": calibration,
        "text_column": text_column,
        "num_samples": num_samples,
        "seq_len": seq_len,
        "batch_size": batch_size,
        "pack": pack,
        "seed": seed,
        "device": device,
        "group_size": group_size,
        "kv_cache": kv_cache,
        "lm_head": lm_head,
        "ignore": ignore or (),
        "fast": fast,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
        "checkpoint_save_path": checkpoint_save_path,
        "checkpoint_restore_path": checkpoint_restore_path,
        "trust_pickle": trust_pickle,
        "backend_python": backend_python,
    }
    request = prepare(model_path, need_data=not dry_run, **options)
    if dry_run:
        return show(request.to_dict, tables.plan(request), as_json)
    with progress(quiet=quiet, verbose=verbose) as on_event:
        result = run(request, on_event=on_event)
    show(result.to_dict, result.summary(), as_json)
