"""Text for a terminal: control characters are escaped, and text that cannot be written is lost
without ending the work.
"""

from __future__ import annotations

import io
import logging
import os
import re
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_STDIN, _STDOUT, _STDERR = 0, 1, 2
_TQDM_MOVES = re.compile(r"(?:\r|\n|\x1b\[A)*")  # how progress bars of libraries redraw a line


def printable(text: str) -> str:
    """Return ``text``, which may quote names from hostile files, on one line. Characters that are
    not printable (control characters, marks of direction, halves of surrogate pairs) are escaped.
    """
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def printable_lines(text: str) -> str:
    """Return ``text`` as `printable` does, but with its line breaks."""
    return "\n".join(map(printable, text.split("\n")))


class EscapingFormatter(logging.Formatter):
    """Formats each record on one line, `printable`; below it a traceback."""

    def __init__(self) -> None:
        super().__init__("%(levelname)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  logging's name
        """Return the line of ``record``."""
        return printable(super().formatMessage(record))


def guard_streams() -> None:
    """Keep standard streams that are closed or full from ending the work.

    A closed descriptor is opened on /dev/null, so that no other file gets its number. Text for
    stderr, also that of libraries, is escaped, and is lost when it cannot be written.
    """
    for descriptor in (_STDIN, _STDOUT, _STDERR):
        _open_if_closed(descriptor)
    if sys.stdout is None:
        sys.stdout = lossy_stream(_STDOUT)
    elif isinstance(sys.stdout, io.TextIOWrapper):
        # for characters that the terminal lacks, e.g. the lines of a table
        sys.stdout.reconfigure(errors="backslashreplace")
    if sys.stderr is sys.__stderr__:
        sys.stderr = _EscapedText(_LossyFile(_STDERR), encoding=_encoding(sys.stderr))


def lossy_stream(descriptor: int) -> TextIO:
    """Return a stream whose writes never fail: what cannot be written is lost."""
    return _LossyText(_LossyFile(descriptor), encoding="utf-8")


def _open_if_closed(descriptor: int) -> None:
    try:
        os.fstat(descriptor)
    except OSError:
        nowhere = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
        os.set_inheritable(nowhere, True)
        assert nowhere == descriptor


def _encoding(stream: TextIO | None) -> str:
    return stream.encoding if stream is not None else "utf-8"


class _LossyFile(io.FileIO):
    """A file on a descriptor, which stays open at the end; its writes never fail."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)

    def write(self, data: ReadableBuffer, /) -> int:
        """Write ``data``, or lose it."""
        size = memoryview(data).nbytes
        try:
            return super().write(data) or size  # None: a non-blocking pipe is full
        except OSError:
            return size


class _LossyText(io.TextIOWrapper):
    """Text to a `_LossyFile`, line by line."""

    def __init__(self, file: _LossyFile, encoding: str) -> None:
        super().__init__(
            io.BufferedWriter(file),
            encoding=encoding,
            errors="backslashreplace",
            line_buffering=True,
            write_through=True,
        )


class _EscapedText(_LossyText):
    """Messages of qtool and of libraries. The only control characters in it are line breaks, and on
    a terminal those by which progress bars move the cursor.
    """

    def write(self, text: str, /) -> int:
        """Write ``text`` escaped. All lines after the first are indented, so that they do not look
        like messages of their own.
        """
        moves = _TQDM_MOVES.match(text) if self.isatty() else None
        start = moves.end() if moves else 0
        lines = printable_lines(text[start:])
        super().write(text[:start] + lines[:-1].replace("\n", "\n  ") + lines[-1:])
        return len(text)
