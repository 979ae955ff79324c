"""Every failure a user can act on, as a tree of classes: one exit code for each branch, one stable
code for each leaf.

QtoolError                     1  a bug, unless a branch below says otherwise
+- UsageError                  2  the command line names something that does not exist
+- InputRefused                3  what was given cannot be used
|  +- CheckpointRefused           a model folder or one of its files
|  +- RecipeRefused               a recipe, a pattern, a scheme no backend can run
|  +- DataRefused                 calibration or evaluation data
|  +- StateRefused                a saved ModelOpt state
+- ResourceError               4  disk, memory, a device, the network, a missing package
+- BackendFailed               5  a library failed on input that was accepted
+- OutputTaken                 6  the output exists or another run is writing it
+- GateFailed                  7  the quality gate
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

MAX_MESSAGE = 300


class QtoolError(Exception):
    """A failure the user can act on: a stable ``code``, what happened, and in ``hint`` what to try
    next.
    """

    exit_code = 1

    def __init__(self, code: str, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint
        self.add_note(f"{code}; {hint}" if hint else code)  # Python shows it below the message

    def to_dict(self) -> dict[str, object]:
        """Return the error as it crosses a pipe or appears under ``--json``."""
        return {
            "code": self.code,
            "message": self.message,
            "hint": self.hint,
            "exit_code": self.exit_code,
        }


class UsageError(QtoolError):
    """The command line, or a Python call, names something that does not exist or does not fit
    together.
    """

    exit_code = 2


class InputRefused(QtoolError):
    """What was given cannot be used."""

    exit_code = 3


class CheckpointRefused(InputRefused):
    """A model folder, or a file in it, is not what it must be."""


class RecipeRefused(InputRefused):
    """A recipe cannot be read, or asks for what cannot be done to this model."""


class DataRefused(InputRefused):
    """Calibration data is missing, broken or useless."""


class StateRefused(InputRefused):
    """A saved ModelOpt state is missing, broken, unsafe or of another model."""


class ResourceError(QtoolError):
    """Disk, memory, a device, the network or an installed package is missing."""

    exit_code = 4


class BackendFailed(QtoolError):
    """A library failed on input that qtool had accepted."""

    exit_code = 5


class OutputTaken(QtoolError):
    """The output exists already, or another run is writing it."""

    exit_code = 6


class GateFailed(QtoolError):
    """The result is complete, and worse than the gate allows."""

    exit_code = 7


_BY_NAME = {
    kind.__name__: kind
    for kind in (
        QtoolError,
        UsageError,
        InputRefused,
        CheckpointRefused,
        RecipeRefused,
        DataRefused,
        StateRefused,
        ResourceError,
        BackendFailed,
        OutputTaken,
        GateFailed,
    )
}


def to_wire(error: QtoolError) -> dict[str, object]:
    """Return ``error`` as plain data that `from_wire` turns back into the same class."""
    return {"type": type(error).__name__, **error.to_dict()}


def from_wire(data: Mapping[str, object]) -> QtoolError:
    """Rebuild an error that a worker sent with `to_wire`."""
    kind = _BY_NAME[str(data["type"])]
    return kind(str(data["code"]), str(data["message"]), hint=str(data["hint"]))


def one_line(error: BaseException) -> str:
    """Return what ``error`` says, without the line breaks that libraries like, and no more of it
    than a person reads.
    """
    return " ".join(str(error).split())[:MAX_MESSAGE]


def nearest(name: str, known: Iterable[str], *, count: int = 3) -> str:
    """Return `` did you mean `a` or `b`?`` for the known names closest to ``name``; empty when none
    is close.
    """
    by_lower = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=count, cutoff=0.4)
    return f"did you mean {' or '.join(f'`{by_lower[c]}`' for c in close)}?" if close else ""
