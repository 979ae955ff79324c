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
+- Interruption              129  SIGHUP; 130 SIGINT; 143 SIGTERM
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path

MAX_MESSAGE = 300
# limits of `nearest`, whose time grows with both
MAX_NAME = 200
MAX_KNOWN = 10_000
# these are about the machine, whatever file they name
_MACHINE_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.ENOMEM),
    *(errno.EROFS, errno.EIO),
)
ANY_FILE = Path("/")  # `reading` of code that writes no files
# these are about one file, which libraries do not always name
_FILE_ERRORS = (
    *(errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.EBUSY, errno.ETXTBSY, errno.EEXIST, errno.ENOTEMPTY, errno.EXDEV),
)
_TAKEN = (errno.EBUSY, errno.ETXTBSY, errno.EEXIST, errno.ENOTEMPTY, errno.EXDEV)


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


class Interruption(QtoolError):
    """A signal ended the command."""

    def __init__(self, code: str, message: str, *, exit_code: int) -> None:
        super().__init__(code, message)
        self.exit_code = exit_code


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


def from_os_error(error: OSError, *, reading: Iterable[Path] = (), where: str = "") -> QtoolError:
    """Return what a failed file operation means to the user.

    Args:
        error: the error of the operation.
        reading: the files and folders that the run reads; all others are taken for written ones.
        where: how far the work was, e.g. ``while saving``.
    """
    name = _file_name(error) or "a file"
    at = f" {where}" if where else ""
    reason = (error.strerror or one_line(error)) + at
    if error.errno == errno.ENOENT and "temporary directory" in reason:  # as `tempfile` says it
        return ResourceError(
            "E_TEMPORARY_FILES",
            f"there is no place for a temporary file: {reason}",
            hint="free some space, or set TMPDIR to a folder on another disk",
        )
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(
            "E_DISK",
            f"the disk is full{at}: {name}",
            hint="free some space, or write to another disk with --output",
        )
    if error.errno == errno.EFBIG:
        return ResourceError(
            "E_FILE_SIZE",
            f"{name} would be larger than the file system or `ulimit -f` allows",
            hint="write to another disk, raise the limit, or lower --max-shard-size",
        )
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return ResourceError(
            "E_OPEN_FILES", f"too many files are open: {name}", hint="raise `ulimit -n`"
        )
    if error.errno == errno.ENOMEM:
        return ResourceError(
            "E_OUT_OF_MEMORY",
            f"the system has no memory for {name}: {reason}",
            hint="end other programs, or use a machine with more memory",
        )
    if _is_below(name, reading):
        return CheckpointRefused(
            "E_UNREADABLE",
            f"{name} cannot be read: {reason}",
            hint="check its name, its permissions and the disk",
        )
    if error.errno in _TAKEN:
        return OutputTaken(
            "E_OUTPUT_IN_USE",
            f"{name} is in use or appeared meanwhile: {reason}",
            hint="end the program that uses it, or choose another --output",
        )
    return ResourceError(
        "E_UNWRITABLE",
        f"{name} cannot be written: {reason}",
        hint="check its permissions and the disk, or choose another --output",
    )


def is_there(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` exists, be it a link that leads nowhere.

    Raises: OSError, when the disk does not tell; `os.path.lexists` takes that for a no.
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # or a name that none can have
        return False
    return True


@contextlib.contextmanager
def file_errors(*, reading: Iterable[Path] = ()) -> Iterator[None]:
    """Turn an OSError of the block into a QtoolError by `from_os_error`."""
    try:
        yield
    except OSError as error:
        raise from_os_error(error, reading=reading) from error


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add ``path`` to an OSError of the block that names no file, as those of reads and writes."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = os.fspath(path)
        raise


def library_os_error(error: BaseException, roots: Iterable[Path]) -> OSError | None:
    """Return the failed file operation behind ``error``, which a library raised; None when there is
    none, or it concerns neither the machine nor a file below ``roots``.
    """
    roots = list(roots)
    seen: BaseException | None = error
    for _ in range(8):  # causes of causes
        if seen is None:
            return None
        found = _os_error_in(seen, roots)
        # libraries look for files that may be missing, and go on to fail elsewhere
        if found and (seen is error or found.errno != errno.ENOENT):
            return found
        seen = seen.__cause__ or seen.__context__
    return None


def _os_error_in(error: BaseException, roots: Iterable[Path]) -> OSError | None:
    """Return the OSError that ``error`` is or quotes; None as in `library_os_error`."""
    if isinstance(error, OSError) and error.errno:
        name = _file_name(error)
        known = _MACHINE_ERRORS if name else (*_MACHINE_ERRORS, *_FILE_ERRORS)
        return error if error.errno in known or _is_below(name, roots) else None
    text = str(error)
    file = _file_in(text, roots)
    code = _code_in(text, has_file=file is not None)
    if file and not code and isinstance(error, FileNotFoundError):
        code = errno.ENOENT  # as safetensors reports whatever it cannot open
    return OSError(code, os.strerror(code), file) if code else None


def _code_in(text: str, *, has_file: bool) -> int:
    """Return the errno that ``text`` quotes by number or message; 0 when it quotes none, or one
    that any file may be meant by.
    """
    codes = (*_MACHINE_ERRORS, *_FILE_ERRORS, *((errno.ENOENT,) if has_file else ()))
    if found := re.search(r"\(os error (\d{1,3})\)", text):  # as Rust writes it
        return int(found[1]) if int(found[1]) in codes else 0
    quoted = codes if has_file else _MACHINE_ERRORS
    return next((code for code in quoted if os.strerror(code) in text), 0)


def _file_in(text: str, roots: Iterable[Path]) -> str | None:
    """Return the name of a file below ``roots`` that ``text`` quotes; None when it quotes none."""
    for root in sorted(map(str, _with_targets(roots)), key=len, reverse=True):
        # neither `/disk` in `/mnt/disk` nor in `/disk-2`
        name = rf"(?<![\w/.~-]){re.escape(root)}(?:/[^\s<>'\"]*|(?=[\s<>'\",:;)]|\.?(?:\s|$)))"
        if found := re.search(name, text):
            return found[0].rstrip(".,:;)")
    return None


def _file_name(error: OSError) -> str:
    """Return the file that ``error`` names, of a rename the new name; empty when it names none."""
    name = error.filename2 or error.filename
    return os.fsdecode(name) if isinstance(name, str | bytes) else ""


def _is_below(name: str, roots: Iterable[Path]) -> bool:
    """Whether the file ``name`` is one of ``roots`` or inside one."""
    if not name:
        return False
    file = Path(name).absolute()
    return any(file.is_relative_to(root) for root in _with_targets(roots))


def _with_targets(roots: Iterable[Path]) -> set[Path]:
    """Return ``roots`` as absolute paths, and where they lead if they are links."""
    return {path for root in roots for path in (root.absolute(), Path(os.path.realpath(root)))}


def one_line(error: BaseException) -> str:
    """Return what ``error`` says, without the line breaks that libraries like, and no more of it
    than a person reads.
    """
    return " ".join(str(error).split())[:MAX_MESSAGE]


def nearest(name: str, known: Iterable[str], *, count: int = 3) -> str:
    """Return `` did you mean `a` or `b`?`` for the known names closest to ``name``; empty when none
    is close.
    """
    by_lower = {candidate[:MAX_NAME].lower(): candidate for candidate in islice(known, MAX_KNOWN)}
    close = difflib.get_close_matches(name[:MAX_NAME].lower(), by_lower, n=count, cutoff=0.4)
    return f"did you mean {' or '.join(f'`{by_lower[c]}`' for c in close)}?" if close else ""
