"""What a command prints: its result, as text or as one JSON document, on stdout; all else on
stderr.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TextIO

from qtool.errors import ResourceError
from qtool.terminal import printable, printable_lines

if TYPE_CHECKING:
    from rich.console import RenderableType

WIDTH = 160  # of tables, when stdout is not a terminal


@dataclass
class Outcome:
    """What a command has printed and published so far; an error report depends on both."""

    stdout: TextIO
    """Where the result goes. ``sys.stdout`` is stderr while a command runs, for what libraries
    print.
    """

    has_result: bool = False
    """Whether the result was printed: under --json no second document may follow."""

    published: list[str] = field(default_factory=list)
    """Output folders that are complete."""


_outcome = Outcome(sys.stdout)


def begin() -> Outcome:
    """Start and return the outcome of a command."""
    global _outcome  # a process runs one command
    _outcome = Outcome(sys.stdout)
    return _outcome


def current() -> Outcome:
    """Return the outcome of the command that runs."""
    return _outcome


def show(data: Callable[[], object], shown: RenderableType, as_json: bool) -> None:
    """Print the result: what ``data`` returns as JSON, or ``shown``.

    Raises: ResourceError, when stdout cannot be written.
    """
    text = document(data()) if as_json else _drawn(shown)
    _outcome.has_result = True
    try:
        _outcome.stdout.write(text)
        _outcome.stdout.flush()
    except OSError as error:
        discard_stdout()
        kept = [f"the output is complete: {path}" for path in _outcome.published]
        raise ResourceError(
            "E_STDOUT",
            f"the result cannot be written to stdout: {error.strerror}",
            hint="; ".join(kept) or "write it to a file on another disk",
        ) from error


def discard_stdout() -> None:
    """Redirect stdout to nowhere, so that Python does not fail to flush it at the end."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, _outcome.stdout.fileno())
        os.close(nowhere)


def message(text: str) -> None:
    """Print ``text`` on one line of stderr."""
    print(printable(text), file=sys.stderr, flush=True)


def document(data: object) -> str:
    """Return ``data`` as JSON; NaN and infinity become null."""
    try:
        return json.dumps(data, indent=2, allow_nan=False) + "\n"
    except ValueError:  # NaN or infinity
        from qtool.checkpoint.strict_json import finite

        return json.dumps(finite(data), indent=2, allow_nan=False) + "\n"


def _drawn(shown: RenderableType) -> str:
    if isinstance(shown, str):
        return printable_lines(shown) + "\n"
    from qtool.cli.console import EscapingConsole

    stdout = _outcome.stdout
    console = EscapingConsole(
        file=stdout, soft_wrap=False, width=None if stdout.isatty() else WIDTH
    )
    with console.capture() as capture:
        console.print(shown)
    return capture.get()
