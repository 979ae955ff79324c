"""The command line: parse, call one function, print what it returns. Errors become one message and an exit code, here alone."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from qtool import __version__
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
)
from qtool.cli.output import printable, show
from qtool.cli.serve import serve
from qtool.errors import QtoolError, ResourceError, UsageError

CLICK_USAGE_ERROR: Any = (
    typer.BadParameter.__base__
)  # typer has a click of its own and shows it nowhere
app = typer.Typer(
    name="qtool",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"qtool {__version__}")
        raise typer.Exit


@app.callback()
def qtool(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version and exit.", callback=_show_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Quantize language models with GPTQModel, LLM Compressor or NVIDIA ModelOpt, into checkpoints that load."""


@app.command()
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
            help="Folder to write. \\[default: ./MODEL-METHOD]",
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
        typer.Option(min=1, help="Calibration samples. \\[recipe: 512]", show_default=False),
    ] = None,
    seq_len: Annotated[
        int | None,
        typer.Option(
            min=16, help="Tokens of a sample, at most. \\[recipe: 2048]", show_default=False
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Samples in one forward pass; only equal lengths share one. \\[recipe: 1]",
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
        typer.Option(
            min=0, help="For shuffling and the library. \\[recipe: 0]", show_default=False
        ),
    ] = None,
    device: Device = "auto",
    backend: Annotated[
        str | None,
        typer.Option(
            help="llmcompressor, gptqmodel, modelopt or torchao. \\[recipe]", show_default=False
        ),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            min=-1,
            help="Inputs that share a scale; -1 for one a row. \\[recipe]",
            show_default=False,
        ),
    ] = None,
    kv_cache: Annotated[
        str | None,
        typer.Option(help="KV cache scales: fp8 or nvfp4. \\[recipe]", show_default=False),
    ] = None,
    lm_head: Annotated[
        bool | None,
        typer.Option(
            "--lm-head/--no-lm-head",
            help="Quantize the output head too. \\[recipe: no]",
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
    with progress(quiet=quiet) as on_event:
        result = run(request, on_event=on_event)
    show(result.to_dict, result.summary(), as_json)


@app.command()
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
            help="What --requantize rounds to, e.g. W4A16. \\[the nearest]", show_default=False
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
    debug: Debug = False,
) -> None:
    """Write a quantized checkpoint in another format, or export a saved ModelOpt state; never calibrates."""
    from qtool.cli.progress import progress
    from qtool.conversion import export as run

    with progress(quiet=quiet) as on_event:
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


@app.command()
def inspect(
    model_path: ModelPath,
    modules: Annotated[
        bool, typer.Option("--modules", help="Show every linear layer, as a tree.")
    ] = False,
    deep: Annotated[
        bool,
        typer.Option(
            "--deep", help="Read all data: bad values, saturation, dead channels, scales, digests."
        ),
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
        typer.Option(help="The engine's version. \\[that of the rules]", show_default=False),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(help="Architecture or card, e.g. sm_90 or h100.", show_default=False),
    ] = None,
    tensor_parallel: Annotated[
        int, typer.Option("--tp", "--tensor-parallel", help="GPUs that share each layer.")
    ] = 1,
    html: Annotated[
        Path | None,
        typer.Option(help="Write the report to this file, one page.", show_default=False),
    ] = None,
    revision: Revision = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a checkpoint holds, whether its numbers are sound, and where it will load; exit code 3 when it will not."""
    from qtool.checkpoint import open_checkpoint, resolve_model
    from qtool.inspection import inspect as run
    from qtool.inspection import render, render_page

    gc.disable()  # the objects of a large checkpoint are many, none is garbage, and the process ends soon
    if engine is None and (engine_version or gpu or tensor_parallel != 1):
        raise UsageError(
            "E_NO_ENGINE",
            "--engine-version, --gpu and --tp are questions to an engine",
            hint="add --engine vllm",
        )
    if html:
        place = html if html.exists() else html.parent
        if html.is_dir() or not os.access(place, os.W_OK):
            raise ResourceError(
                "E_OUTPUT_PLACE", f"{html}: cannot write there", hint="choose another file"
            )
    found = run(
        open_checkpoint(resolve_model(model_path, revision=revision)),
        deep=deep,
        against=open_checkpoint(resolve_model(against)) if against else None,
        engine=engine,
        engine_version=engine_version,
        gpu=gpu,
        tensor_parallel=tensor_parallel,
    )
    if html:
        html.write_text(render_page(found), encoding="utf-8")
    show(found.to_dict, render(found, modules=modules), as_json)
    if found.engine and not found.engine.loads:
        raise typer.Exit(3)


app.command(context_settings={"allow_extra_args": True})(serve)


def main(argv: Sequence[str] | None = None) -> None:
    """Run qtool; a QtoolError becomes one message on stderr, or a JSON document on stdout, and its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    signal.signal(signal.SIGTERM, _terminate)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(
                errors="backslashreplace"
            )  # a terminal that knows no box characters is no reason to fail
    try:
        exit_code = app(args=arguments, prog_name="qtool", standalone_mode=False)
    except QtoolError as error:
        _fail(error, arguments)
    except CLICK_USAGE_ERROR as error:
        command = error.ctx.command_path if error.ctx else "qtool"
        _fail(
            UsageError(
                "E_USAGE", error.format_message(), hint=f"`{command} --help` shows the options"
            ),
            arguments,
        )
    except (KeyboardInterrupt, typer.Abort):
        exit_code = 130
    if exit_code == 130:
        typer.echo("interrupted; no output was written", err=True)
    sys.exit(exit_code)


def _fail(error: QtoolError, arguments: Sequence[str]) -> NoReturn:
    if "--debug" in arguments:
        traceback.print_exc()
    if "--json" in arguments:
        print(json.dumps({"error": error.to_dict()}))
    hint = f"\nhint: {printable(error.hint)}" if error.hint else ""
    typer.echo(f"error[{error.code}]: {printable(error.message)}{hint}", err=True)
    sys.exit(error.exit_code)


def _terminate(number: int, frame: FrameType | None) -> None:
    sys.exit(143)
