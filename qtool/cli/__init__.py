"""The command line: parse, call one function, print what it returns. Whatever ends a command
becomes one message and an exit code, here alone.
"""

from __future__ import annotations

import itertools
import sys
import traceback
from collections.abc import Sequence, Set
from pathlib import Path

from qtool.cli.output import begin, current, discard_stdout, document, message
from qtool.cli.signals import Interrupted, catch_signals, ignore_signals
from qtool.errors import Interruption, QtoolError, ResourceError, from_os_error, one_line
from qtool.memory import check_address_space, memory_error
from qtool.terminal import guard_streams


def main(argv: Sequence[str] | None = None) -> None:
    """Run qtool. An error becomes one message on stderr, with --json also the one document on
    stdout, and the exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    # what follows `--` is the engine's
    flags = set(itertools.takewhile(lambda argument: argument != "--", arguments))
    guard_streams()
    begin()
    exit_code, failure = 0, None
    try:
        catch_signals()
        check_address_space()
        _check_current_folder()
        from qtool.cli.app import run  # in the block, so that a failed import has an exit code too

        exit_code = run(arguments)
    except BaseException as error:
        ignore_signals()
        failure = _as_qtool_error(error)
        if "--debug" in flags and isinstance(error, QtoolError):
            traceback.print_exc()
    ignore_signals()
    if failure is not None:
        _report(failure, flags)
        exit_code = failure.exit_code
    sys.exit(exit_code)


def _check_current_folder() -> None:
    """Refuse to run in a folder that was deleted: relative paths mean nothing there, and libraries
    end the process.
    """
    try:
        Path.cwd()
    except FileNotFoundError:
        raise ResourceError(
            "E_CURRENT_FOLDER",
            "the current folder was deleted",
            hint='change to another folder, or to the new one of that name: cd "$PWD"',
        ) from None


def _as_qtool_error(error: BaseException) -> QtoolError:
    """Return ``error`` as the user sees it; the traceback of a bug is printed."""
    if isinstance(error, QtoolError):
        return error
    if isinstance(error, Interrupted):
        done = "; ".join(f"{path} is complete" for path in current().published)
        text = f"interrupted by {error.name}; {done or 'no output was written'}"
        return Interruption("E_INTERRUPTED", text, exit_code=128 + error.number)
    no_memory = memory_error(error, "qtool")
    if no_memory is not None:
        return no_memory
    if isinstance(error, OSError) and error.errno is not None:
        return from_os_error(error)
    traceback.print_exception(error)
    return QtoolError(
        "E_BUG",
        f"{type(error).__name__}: {one_line(error)}",
        hint="this is a bug in qtool: please report it with the traceback",
    )


def _report(error: QtoolError, flags: Set[str]) -> None:
    """Print ``error`` on stderr, and with --json as the document if none was printed yet."""
    outcome = current()
    if "--json" in flags and not outcome.has_result:
        published = {"published": outcome.published} if outcome.published else {}
        try:
            outcome.stdout.write(document({"error": {**error.to_dict(), **published}}))
            outcome.stdout.flush()
        except OSError:
            discard_stdout()  # the message on stderr is enough
    if isinstance(error.__cause__, BrokenPipeError):
        return  # the reader of the result closed the pipe, e.g. `head`
    message(f"error[{error.code}]: {error.message}")
    if error.hint:
        message(f"hint: {error.hint}")
    for path in outcome.published:
        if path not in error.message + error.hint:
            message(f"note: {path} is complete")
