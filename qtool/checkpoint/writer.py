"""Write a checkpoint folder: stage it next to its place, make it durable, rename it. Killed at any
moment, it is absent or whole.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from qtool.errors import OutputTaken, ResourceError, UsageError, file_errors, naming
from qtool.sizes import format_size

CHUNK_BYTES = 4 << 20
SAMPLE_EVERY, SAMPLE_BYTES = 64 << 20, 64 << 10
LOCK_WAIT_S = 5.0  # a killed run's worker needs a moment to notice and let go
# what has one may be overwritten
MARKS = (
    "qtool-manifest.json",
    "qtool-state.json",
    "model.safetensors",
    "model.safetensors.index.json",
)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fs.h


@dataclass(frozen=True)
class Staging:
    """A folder next to the output: ``checkpoint`` in it becomes the output, ``scratch`` is thrown
    away.
    """

    output: Path
    root: Path
    """The staging folder itself."""
    lock_fd: int
    """An open descriptor of the lock that keeps other runs out."""
    overwrite: bool
    """Whether `publish` may replace a former output."""

    @property
    def checkpoint(self) -> Path:
        """What `publish` will move into place."""
        return self.root / "checkpoint"

    @property
    def scratch(self) -> Path:
        """Where a library may put what it likes."""
        return self.root / "scratch"

    def files(self) -> list[Path]:
        """Return the files in ``checkpoint`` so far."""
        return [path for path in self.checkpoint.iterdir() if path.is_file()]

    def flush(self) -> None:
        """Make what is in ``checkpoint`` so far durable; costs little for what already is."""
        for path in self.checkpoint.iterdir():
            make_durable(path)
        make_durable(self.checkpoint)

    def publish(self) -> None:
        """Make every byte durable, then put the checkpoint in its place in one step, replacing a
        former output if that was asked for.
        """
        self.flush()
        if self.overwrite and self.output.exists():
            _exchange(self.checkpoint, self.output, aside=self.root / "previous")
        elif os.path.lexists(self.output):
            raise OutputTaken(
                "E_OUTPUT_EXISTS",
                f"{self.output} appeared meanwhile",
                hint="choose another --output, or replace it with --overwrite",
            )
        else:
            self.checkpoint.rename(self.output)
        make_durable(self.output.parent)


@contextlib.contextmanager
def stage_output(
    output: Path, *, inputs: Iterable[Path], overwrite: bool, need_bytes: int
) -> Iterator[Staging]:
    """Give a locked `Staging` for ``output`` and remove it afterwards, whatever happened.

    Raises: UsageError, when ``output`` is one of the run's ``inputs``, inside one, or around one;
        OutputTaken, when it exists (without ``overwrite``), is no checkpoint, or another run is
        writing it; ResourceError, when the disk has less than ``need_bytes`` free or the place
        cannot be written.
    """
    output = output.absolute()
    inputs = list(inputs)
    _check_apart(output, inputs)
    root = output.parent / f".{output.name}.qtool"
    with file_errors(reading=inputs), _locked(root, output) as lock_fd:
        _recover(root, output)
        _check_free(output, overwrite=overwrite)
        check_disk(root, need_bytes)
        staging = Staging(output, root, lock_fd, overwrite)
        staging.checkpoint.mkdir()
        staging.scratch.mkdir()
        yield staging


def _check_apart(output: Path, inputs: Iterable[Path]) -> None:
    """Raise UsageError when ``output`` is one of ``inputs``, inside one, or around one."""
    inside = output.resolve()
    for path in inputs:
        place = path.resolve()
        if inside == place or place in inside.parents or inside in place.parents:
            raise UsageError(
                "E_OUTPUT_PLACE",
                f"the output {output} and {path} are one inside the other",
                hint="write to a folder of its own",
            )


def _check_free(output: Path, *, overwrite: bool) -> None:
    """Raise OutputTaken when ``output`` exists and may not be replaced."""
    if not os.path.lexists(output):
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
    is_checkpoint = any((output / name).exists() for name in MARKS)
    if any(output.iterdir()) and not is_checkpoint:
        raise OutputTaken(
            "E_OUTPUT_EXISTS",
            f"{output} holds files and is not a checkpoint, so --overwrite does not replace it",
            hint="choose another --output, or empty the folder yourself",
        )


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


def digest_files(
    files: Iterable[Path], *, stop: threading.Event | None = None
) -> dict[str, dict[str, object]]:
    """Return ``{name: {"sha256": ..., "size_bytes": ...}}`` for ``files``, hashed in parallel; once
    ``stop`` is set, of as much as was read.
    """
    ordered = sorted(files)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        digests = pool.map(lambda file: _sha256(file, stop or threading.Event()), ordered)
        return {
            file.name: {"sha256": digest, "size_bytes": file.stat().st_size}
            for file, digest in zip(ordered, digests, strict=True)
        }


def sample_files(files: Iterable[Path]) -> dict[str, dict[str, object]]:
    """Return ``{name: {"sample_sha256": ..., "size_bytes": ...}}``: of the size, the first 4 MB,
    where the header is, and 64 kB of each 64 MB.

    Tells which file it was in a fraction of the time that all its bytes take.
    """
    return {
        path.name: {"sample_sha256": _sampled(path), "size_bytes": path.stat().st_size}
        for path in sorted(files)
    }


def _sampled(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with naming(path), path.open("rb", buffering=0) as file:
        digest.update(file.read(CHUNK_BYTES))
        for start in range(SAMPLE_EVERY, size, SAMPLE_EVERY):
            file.seek(start)
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _sha256(path: Path, stop: threading.Event) -> str:
    digest, buffer = hashlib.sha256(), bytearray(CHUNK_BYTES)
    with naming(path), path.open("rb", buffering=0) as file:
        while (count := file.readinto(buffer)) and not stop.is_set():
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


@contextlib.contextmanager
def _locked(root: Path, output: Path) -> Iterator[int]:
    """Hold ``root``'s lock, and leave no ``root`` behind.

    The lock file goes with its holder, so a waiter checks that it still has the real one.
    """
    made = [parent for parent in root.parents if not parent.exists()]  # innermost first
    try:
        lock_fd = _acquire(root, output)
        try:
            yield lock_fd
        finally:
            with contextlib.suppress(OSError):
                _recover(root, output)
                (root / "lock").unlink()  # last: from here on the next run may begin
                root.rmdir()
            os.close(lock_fd)
    finally:
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()  # fails, and ends this, where something was written


def _acquire(root: Path, output: Path) -> int:
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            root.mkdir(parents=True, exist_ok=True)
            lock_fd = os.open(root / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            if (
                isinstance(error, FileNotFoundError | FileExistsError)
                and time.monotonic() < deadline
            ):
                time.sleep(0.01)
                continue  # another run just ended and took the folder away
            raise ResourceError(
                "E_OUTPUT_PLACE",
                f"{root.parent}: cannot write there ({error.strerror})",
                hint="choose another --output",
            ) from error
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if (root / "lock").exists() and os.path.samestat(
                os.fstat(lock_fd), (root / "lock").stat()
            ):
                return lock_fd
        except BlockingIOError:
            if time.monotonic() > deadline:
                hint = "wait for the other run, or choose another --output"
                raise OutputTaken(
                    "E_OUTPUT_IN_USE", f"another run is writing {output}", hint=hint
                ) from None
        os.close(lock_fd)
        time.sleep(0.1)


def _recover(root: Path, output: Path) -> None:
    """Finish what a killed run left: a replaced output goes back to its place, the rest
    goes away.
    """
    previous = root / "previous"
    if previous.exists() and not output.exists():
        previous.rename(output)
    for path in root.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != "lock":
            path.unlink()


def _exchange(new: Path, old: Path, *, aside: Path) -> None:
    """Swap two folders in one step where the system can; else in two, which `_recover` can
    finish.
    """
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if (
            libc.renameat2(
                _AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE
            )
            == 0
        ):
            return
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(code, os.strerror(code), str(old))
    except AttributeError:
        pass  # not Linux
    old.rename(aside)
    new.rename(old)


def make_durable(path: Path) -> None:
    """Wait until ``path``, a file or a folder, is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(fd)
    finally:
        os.close(fd)
