"""The command line: parse, call one function, print what it returns. Errors become one message and
an exit code, here alone.
"""

from __future__ import annotations

import itertools
import json
import signal
import sys
import traceback
from collections.abc import Sequence, Set
from io import TextIOWrapper
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from qtool import __version__
from qtool.cli.export import export
from qtool.cli.help import GroupedCommand
from qtool.cli.inspect import inspect
from qtool.cli.output import printable
from qtool.cli.quantize import quantize
from qtool.cli.serve import serve
from qtool.errors import QtoolError, UsageError

# typer has a click of its own and shows it nowhere
CLICK_USAGE_ERROR: Any = typer.BadParameter.__base__
app = typer.Typer(
    name="qtool",
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
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
    """Quantize language models with GPTQModel, LLM Compressor or NVIDIA ModelOpt, into checkpoints
    that load.
    """


for command in (quantize, export, inspect):
    app.command(cls=GroupedCommand)(command)
app.command(cls=GroupedCommand, context_settings={"allow_extra_args": True})(serve)


def main(argv: Sequence[str] | None = None) -> None:
    """Run qtool; a QtoolError becomes one message on stderr, or a JSON document on stdout, and its
    exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    flags = set(itertools.takewhile(lambda argument: argument != "--", arguments))
    signal.signal(signal.SIGTERM, _terminate)
    _print_on_any_terminal()
    try:
        exit_code = app(args=arguments, prog_name="qtool", standalone_mode=False)
    except QtoolError as error:
        _fail(error, flags)
    except CLICK_USAGE_ERROR as error:
        command = error.ctx.command_path if error.ctx else "qtool"
        hint = f"`{command} --help` shows the options"
        _fail(UsageError("E_USAGE", error.format_message(), hint=hint), flags)
    except (KeyboardInterrupt, typer.Abort):
        exit_code = 130
    if exit_code == 130:
        typer.echo("interrupted; no output was written", err=True)
    sys.exit(exit_code)


def _print_on_any_terminal() -> None:
    """Escape what a terminal has no characters for, e.g. the lines of a table."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _fail(error: QtoolError, flags: Set[str]) -> NoReturn:
    """Report ``error`` and exit; ``flags`` are the arguments before `--`, the rest is the
    engine's.
    """
    if "--debug" in flags:
        traceback.print_exc()
    if "--json" in flags:
        print(json.dumps({"error": error.to_dict()}))
    hint = f"\nhint: {printable(error.hint)}" if error.hint else ""
    typer.echo(f"error[{error.code}]: {printable(error.message)}{hint}", err=True)
    sys.exit(error.exit_code)


def _terminate(number: int, frame: FrameType | None) -> None:
    sys.exit(143)
