"""The typer application: the commands, `--version`, and errors of the command line."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from qtool import __version__
from qtool.cli.eval import evaluate
from qtool.cli.export import export
from qtool.cli.help import GroupedCommand
from qtool.cli.inspect import inspect
from qtool.cli.quantize import quantize
from qtool.cli.serve import serve
from qtool.errors import UsageError

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
app.command("eval", cls=GroupedCommand)(evaluate)
app.command(cls=GroupedCommand, context_settings={"allow_extra_args": True})(serve)


def run(arguments: list[str]) -> int:
    """Run the command that ``arguments`` name and return its exit code.

    Raises: QtoolError, also for arguments that no command takes.
    """
    try:
        return app(args=arguments, prog_name="qtool", standalone_mode=False) or 0
    except CLICK_USAGE_ERROR as error:
        raise _usage_error(error) from None


def _usage_error(error: Any) -> UsageError:
    """Return ``error`` with the code that Python callers get for the same mistake."""
    command = error.ctx.command_path if error.ctx else "qtool"
    hint = f"`{command} --help` shows the options"
    text = error.format_message()
    kind = type(error).__name__
    if kind == "NoSuchOption":
        return UsageError("E_UNKNOWN_OPTION", text, hint=hint)
    if kind == "BadParameter":  # only numbers are converted
        return UsageError("E_LIMIT", text, hint=hint)
    return UsageError("E_USAGE", text, hint=hint)
