"""Write a checkpoint folder: stage it next to its place, make it durable, rename it. Killed at any
moment, it is absent or whole.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from qtool.checkpoint.manifest import entries_of, written_files
from qtool.checkpoint.model import INDEX
from qtool.checkpoint.staging_folder import (
    CHECKPOINT,
    LOG,
    PREVIOUS,
    SCRATCH,
    StagingFolder,
    check_staging_folder,
    is_mount_point,
    lock_staging_folder,
)
from qtool.errors import (
    OutputTaken,
    ResourceError,
    UsageError,
    file_errors,
    is_there,
    naming,
)
from qtool.sizes import format_size

LOG_MARK = b"# qtool: what the quantization library printed\n"  # the first line of a log
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fs.h


@dataclass(frozen=True)
class Staging:
    """A folder next to the output: ``checkpoint`` in it becomes the output, ``scratch`` is thrown
    away.
    """

    output: Path
    folder: StagingFolder
    overwrite: bool
    """Whether `publish` may replace a former output."""

    @property
    def checkpoint(self) -> Path:
        """What `publish` will move into place."""
        return self.folder.path / CHECKPOINT

    @property
    def scratch(self) -> Path:
        """Where a library may put what it likes."""
        return self.folder.path / SCRATCH

    @property
    def log(self) -> Path:
        """Where the output of a library goes."""
        return self.folder.path / LOG

    def files(self) -> list[Path]:
        """Return the files in ``checkpoint`` so far."""
        return [path for path in self.checkpoint.rglob("*") if path.is_file()]

    def flush(self) -> None:
        """Make what is in ``checkpoint`` so far durable; costs little for what already is."""
        for path in self.checkpoint.rglob("*"):
            make_durable(path)
        make_durable(self.checkpoint)

    def publish(self) -> None:
        """Make every byte durable, then put the checkpoint in its place in one step, replacing a
        former output if that was asked for.
        """
        self.flush()
        if is_there(self.output):
            if not self.overwrite:
                raise OutputTaken(
                    "E_OUTPUT_EXISTS",
                    f"{self.output} appeared meanwhile",
                    hint="choose another --output, or replace it with --overwrite",
                )
            _check_free(self.output, overwrite=True)  # it may have been replaced meanwhile
            _exchange(self.folder, self.output)
        else:
            self.folder.move_out(CHECKPOINT, self.output)
        make_durable(self.output.parent)

    def publish_log(self, path: Path) -> None:
        """Put the log at ``path``, replacing one of a former run."""
        check_log(path)
        self.folder.move_out(LOG, path)


@contextlib.contextmanager
def stage_output(
    output: Path, *, inputs: Iterable[Path], overwrite: bool, need_bytes: int
) -> Iterator[Staging]:
    """Give a locked `Staging` for ``output`` and remove it afterwards, whatever happened.

    Raises: what `check_output` does, and OutputTaken, when another run is writing ``output``;
        ResourceError, when the disk has less than ``need_bytes`` free.
    """
    output = output.absolute()
    inputs = list(inputs)
    with file_errors(reading=inputs):
        _check_apart(output, inputs)
        _check_writable(output.parent, [_staging_path(output)])
        with lock_staging_folder(_staging_path(output), output) as folder:
            folder.recover(output)
            _check_free(output, overwrite=overwrite)
            check_disk(folder.path, need_bytes)
            folder.make_folder(CHECKPOINT)
            folder.make_folder(SCRATCH)
            yield Staging(output, folder, overwrite)


def check_output(
    output: Path,
    *,
    inputs: Iterable[Path],
    overwrite: bool,
    names: Iterable[str] = (),
    log: Path | None = None,
) -> None:
    """Check, before a run begins, that ``output`` can be written; write nothing.

    Args:
        output: the folder to write.
        inputs: what the run reads.
        overwrite: whether a former output may be replaced.
        names: of the files that will be copied into it.
        log: where the log goes.
    Raises: UsageError, when ``output`` is one of ``inputs``, inside one, or around one;
        OutputTaken, when it exists and may not be replaced, or something else is in the place of
        the staging folder or the log; ResourceError, when it cannot be written.
    """
    output = output.absolute()
    _check_apart(output, inputs)
    staging = _staging_path(output)
    _check_writable(output.parent, [staging / CHECKPOINT / name for name in (INDEX, *names)])
    check_staging_folder(staging)
    if not is_there(staging / PREVIOUS):  # `recover` puts that one back first
        _check_free(output, overwrite=overwrite)
    if log:
        _check_writable(log.parent, [log])
        check_log(log)


def check_log(log: Path) -> None:
    """Raise OutputTaken when something else than the log of a former run is at ``log``."""
    if not is_there(log):
        return
    if log.is_file() and not log.is_symlink():
        with log.open("rb") as file:
            if file.read(len(LOG_MARK)) in (b"", LOG_MARK):
                return
    raise OutputTaken(
        "E_LOG_PLACE",
        f"{log} is in the place of the log, and it is not the log of a former run",
        hint="move it away, or choose another --output",
    )


def _staging_path(output: Path) -> Path:
    return output.parent / f".{output.name}.qtool"


def _check_writable(folder: Path, files: Iterable[Path]) -> None:
    """Raise ResourceError when ``files`` cannot be made in ``folder``, which need not exist yet."""
    existing = next(path for path in (folder, *folder.parents) if is_there(path))
    why = ""
    if not existing.is_dir():
        why = os.strerror(errno.ENOTDIR)
    elif not os.access(existing, os.W_OK | os.X_OK):
        why = os.strerror(errno.EACCES)
    else:
        longest = os.pathconf(existing, "PC_NAME_MAX")
        deepest = os.pathconf(existing, "PC_PATH_MAX")
        for file in files:
            parts = [len(os.fsencode(part)) for part in file.parts]
            if max(parts) > longest or len(os.fsencode(file)) >= deepest:
                why = os.strerror(errno.ENAMETOOLONG)
    if why:
        raise ResourceError(
            "E_OUTPUT_PLACE",
            f"{folder}: cannot write there ({why})",
            hint="choose another --output",
        )


def _check_apart(output: Path, inputs: Iterable[Path]) -> None:
    """Raise UsageError when ``output`` is one of ``inputs``, inside one, or around one."""
    inside = output.resolve()
    for path in inputs:
        resolved = path.resolve()
        if inside == resolved or resolved in inside.parents or inside in resolved.parents:
            raise UsageError(
                "E_OUTPUT_PLACE",
                f"the output {output} and {path} are one inside the other",
                hint="write to a folder of its own",
            )


def _check_free(output: Path, *, overwrite: bool) -> None:
    """Raise OutputTaken when ``output`` exists and may not be replaced."""
    if not is_there(output):
        return
    if not overwrite:
        raise OutputTaken(
            "E_OUTPUT_EXISTS",
            f"{output} exists",
            hint="choose another place, or replace it with --overwrite",
        )
    if output.is_symlink() or not output.is_dir():
        raise OutputTaken(
            "E_OUTPUT_EXISTS",
            f"{output} exists and is not a folder",
            hint="choose another --output",
        )
    if is_mount_point(output):
        raise OutputTaken(
            "E_OUTPUT_IN_USE",
            f"{output} is a mount point, which cannot be renamed",
            hint="write to a folder inside it",
        )
    if strangers := _not_written_by_qtool(output):
        raise OutputTaken(
            "E_OUTPUT_EXISTS",
            f"{output} holds {strangers}, which qtool did not write, so --overwrite does not "
            "replace it",
            hint="move it away, or choose another --output",
        )


def _not_written_by_qtool(output: Path) -> str:
    """Return the names in ``output`` of what qtool did not write, as a part of a sentence."""
    written = written_files(output)
    files = entries_of(output, written)
    strangers = sorted(
        name
        for name, path in files.items()
        if name not in written or path.is_symlink() or not path.is_file()
    )
    more = f" and {len(strangers) - 3} more" if len(strangers) > 3 else ""
    return ", ".join(f"`{name}`" for name in strangers[:3]) + more


def check_disk(folder: Path, need_bytes: int) -> None:
    """Raise ResourceError when ``folder``'s disk has less than ``need_bytes`` free."""
    free = shutil.disk_usage(folder).free
    if free < need_bytes:
        message = (
            f"{folder.parent}: {format_size(need_bytes)} are needed for the output and "
            f"{format_size(free)} are free"
        )
        raise ResourceError(
            "E_DISK", message, hint="free some space, or write to another disk with --output"
        )


def _exchange(folder: StagingFolder, output: Path) -> None:
    """Swap the new checkpoint and ``output`` in one step where the system can; else in two, which
    `recover` can finish.
    """
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        old, new = os.fsencode(output), os.fsencode(CHECKPOINT)
        if libc.renameat2(folder.fd, new, _AT_FDCWD, old, _RENAME_EXCHANGE) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(code, os.strerror(code), str(output))
    except AttributeError:
        pass  # not Linux
    folder.move_in(output, PREVIOUS)
    folder.move_out(CHECKPOINT, output)


def make_durable(path: Path) -> None:
    """Wait until ``path``, a file or a folder, is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(fd)
    finally:
        os.close(fd)
