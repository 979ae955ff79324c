"""The folder ``.OUTPUT.qtool`` that a run works in. A folder of that name is used, emptied and
removed only when it carries qtool's mark and belongs to this user; links are never followed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qtool.errors import OutputTaken, is_there

LOCK_WAIT_S = 5.0  # a killed run's worker needs a moment to notice and let go
MARK = b"qtool staging folder\n"  # what the lock file holds
LOCK, LOG = "lock", "log"
CHECKPOINT, SCRATCH, PREVIOUS = "checkpoint", "scratch", "previous"
FOLDERS = (CHECKPOINT, SCRATCH, PREVIOUS)
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_LOCK_FLAGS = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK


@dataclass(frozen=True)
class StagingFolder:
    """A staging folder whose lock this process holds."""

    path: Path
    fd: int
    """An open descriptor of the folder: ``path`` may lead to another one by now."""
    lock_fd: int
    """An open descriptor of the lock that keeps other runs out."""

    def make_folder(self, name: str) -> None:
        """Make the folder ``name`` in it."""
        os.mkdir(name, dir_fd=self.fd)

    def move_out(self, name: str, path: Path) -> None:
        """Rename ``name`` to ``path``, which is replaced when it is a file or an empty folder."""
        os.rename(name, path, src_dir_fd=self.fd)

    def move_in(self, path: Path, name: str) -> None:
        """Rename ``path`` to ``name``."""
        os.rename(path, name, dst_dir_fd=self.fd)

    def recover(self, output: Path) -> None:
        """Clean up after a killed run: an output that it was replacing goes back to its place, the
        rest is removed.
        """
        if self._holds(PREVIOUS) and not is_there(output):
            self.move_out(PREVIOUS, output)
        for name in (CHECKPOINT, SCRATCH):
            self._remove(name)
        if self._holds(PREVIOUS):
            # renamed, so that it does not come back as the output if this is killed halfway
            os.rename(PREVIOUS, CHECKPOINT, src_dir_fd=self.fd, dst_dir_fd=self.fd)
            self._remove(CHECKPOINT)
        if self._holds(LOG):
            os.unlink(LOG, dir_fd=self.fd)

    def _holds(self, name: str) -> bool:
        return _is_in(self.fd, name)

    def _remove(self, name: str) -> None:
        if self._holds(name):
            shutil.rmtree(name, dir_fd=self.fd)


@contextlib.contextmanager
def lock_staging_folder(path: Path, output: Path) -> Iterator[StagingFolder]:
    """Make or take over the staging folder ``path`` of ``output``, hold its lock, and remove it at
    the end.

    The holder removes the lock file at the end, so a waiter checks that its file is still there.

    Raises: OutputTaken, when another run holds it, or it is not a folder that qtool made.
    """
    made = [parent for parent in path.parents if not parent.exists()]  # innermost first
    try:
        folder = _acquire(path, output)
        try:
            yield folder
        finally:
            with contextlib.suppress(OSError):
                folder.recover(output)
                os.unlink(LOCK, dir_fd=folder.fd)  # last: after this the next run may begin
                if _is_at(folder.fd, path):
                    path.rmdir()
            os.close(folder.lock_fd)
            os.close(folder.fd)
    finally:
        with contextlib.suppress(OSError):
            for parent in made:
                parent.rmdir()  # fails, and ends this, where something was written


def check_staging_folder(path: Path) -> None:
    """Raise OutputTaken when something else than a staging folder of qtool is at ``path``."""
    with contextlib.ExitStack() as opened, contextlib.suppress(FileNotFoundError):
        fd = _open_folder(path)
        opened.callback(os.close, fd)
        lock_fd = _open_lock(fd, path, make=False)
        if lock_fd is not None:
            opened.callback(os.close, lock_fd)
            _check_is_ours(fd, lock_fd, path)


def is_mount_point(path: Path) -> bool:
    """Whether something is mounted at ``path``, bind mounts included."""
    if path.is_mount():
        return True
    try:
        mounts = Path("/proc/self/mountinfo").read_bytes()
    except OSError:
        return False  # not Linux
    escaped = os.fsencode(path.resolve())
    for mark in b"\\ \t\n":
        escaped = escaped.replace(bytes([mark]), b"\\%03o" % mark)
    return any(line.split(b" ")[4] == escaped for line in mounts.splitlines())


def _acquire(path: Path, output: Path) -> StagingFolder:
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            folder = _try_to_acquire(path)
        except (FileNotFoundError, FileExistsError):
            folder = None  # another run just ended and took the folder away
            if time.monotonic() > deadline:
                raise
        except BlockingIOError:
            folder = None
            if time.monotonic() > deadline:
                raise OutputTaken(
                    "E_OUTPUT_IN_USE",
                    f"another run is writing {output}",
                    hint="wait for the other run, or choose another --output",
                ) from None
        if folder:
            return folder
        time.sleep(0.05)


def _try_to_acquire(path: Path) -> StagingFolder | None:
    """Return the folder at ``path``, locked; None when it was replaced meanwhile. An exception
    leaves no new folder behind.
    """
    with contextlib.ExitStack() as undo:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        undo.callback(_remove_if_empty, path)
        fd = _open_folder(path)
        undo.callback(os.close, fd)
        lock_fd = _open_lock(fd, path, make=True)
        assert lock_fd is not None
        undo.callback(os.close, lock_fd)
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not (_is_at(fd, path) and _is_at(lock_fd, LOCK, fd)):
            return None
        _check_is_ours(fd, lock_fd, path)
        if not os.fstat(lock_fd).st_size:
            undo.callback(os.unlink, LOCK, dir_fd=fd)
            os.pwrite(lock_fd, MARK, 0)
            os.fsync(lock_fd)
        undo.pop_all()
        return StagingFolder(path, fd, lock_fd)


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _open_folder(path: Path) -> int:
    try:
        return os.open(path, _FOLDER_FLAGS)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise _not_ours(path, "it is not a folder") from None
        raise


def _open_lock(fd: int, path: Path, *, make: bool) -> int | None:
    """Return a descriptor of the lock in the folder ``fd``; None when it has none and ``make`` is
    false.
    """
    if os.fstat(fd).st_uid != os.geteuid():
        raise _not_ours(path, "it belongs to another user")
    entries = os.listdir(fd)
    if LOCK not in entries:
        if entries:
            raise _not_ours(path, "it has no lock with qtool's mark")
        if not make:
            return None
    exclusive = 0 if entries else os.O_CREAT | os.O_EXCL
    try:
        lock_fd = os.open(LOCK, _LOCK_FLAGS | exclusive, 0o600, dir_fd=fd)
    except OSError as error:
        odd = (errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.EACCES)
        if entries and error.errno in odd:
            raise _not_ours(path, "its lock is not qtool's") from None
        error.filename = os.fspath(path / LOCK)
        raise
    if not stat.S_ISREG(os.fstat(lock_fd).st_mode):
        os.close(lock_fd)
        raise _not_ours(path, "its lock is not a file")
    return lock_fd


def _check_is_ours(fd: int, lock_fd: int, path: Path) -> None:
    """Raise OutputTaken unless a run of this user made the folder."""
    entries = set(os.listdir(fd))
    mark = os.pread(lock_fd, len(MARK) + 1, 0)
    # a run that was killed before it wrote its mark left an empty lock alone
    if mark != MARK and not (mark == b"" and entries == {LOCK}):
        raise _not_ours(path, "it does not carry qtool's mark")
    if strangers := entries - {LOCK, LOG, *FOLDERS}:
        raise _not_ours(path, f"it holds `{min(strangers)}`")
    for name in sorted(entries):
        mode = os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode
        if not (stat.S_ISDIR(mode) if name in FOLDERS else stat.S_ISREG(mode)):
            raise _not_ours(path, f"`{name}` in it is something else")
    if is_mount_point(path):
        raise _not_ours(path, "it is a mount point")


def _is_in(folder: int, name: str) -> bool:
    return name in os.listdir(folder)


def _is_at(fd: int, name: Path | str, folder: int | None = None) -> bool:
    """Whether ``fd`` is a descriptor of the file or folder ``name``."""
    try:
        found = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(fd), found)


def _not_ours(path: Path, why: str) -> OutputTaken:
    return OutputTaken(
        "E_STAGING_PLACE",
        f"{path} is in the place of the staging folder, and qtool did not make it: {why}",
        hint="move it away, or choose another --output",
    )
