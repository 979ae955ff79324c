"""How much memory a process may have, and whether an error says that it was too little; and when
Python need not search it for reference cycles.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import re
import resource
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from qtool.errors import ResourceError, one_line
from qtool.sizes import format_size

LEAST_ADDRESS_SPACE = 256 << 20
# messages of the system, the dynamic loader, C++, Rust, torch and OpenBLAS
_NO_MEMORY = re.compile(
    r"cannot allocate memory|can't allocate memory|failed to map segment|bad_?alloc"
    r"|memory allocation of \d+ bytes failed|not enough memory|out of memory|unable to allocate"
    r"|can't start new thread|unable to mmap|alloc_failed|memory exhausted",
    re.IGNORECASE,
)


def limit_bytes(process: Path = Path("/proc/self")) -> int:
    """Return how much memory ``process`` may have: the least of the machine's memory, the limits of
    its control groups (version 1 or 2, a container's too), and the `ulimit` of this process.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for number in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        soft = resource.getrlimit(number)[0]
        if soft != resource.RLIM_INFINITY:
            limits.append(soft)
    return min([*limits, *_cgroup_limits(process)])


def check_address_space() -> None:
    """Raise ResourceError when `ulimit -v` leaves less than the import of numpy needs: its BLAS
    would ask for memory for ever, and no signal would end it.
    """
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY and limit < LEAST_ADDRESS_SPACE:
        raise ResourceError(
            "E_OUT_OF_MEMORY",
            f"`ulimit -v` leaves {format_size(limit)} and {format_size(LEAST_ADDRESS_SPACE)} are "
            "the least to start with",
            hint="raise `ulimit -v`",
        )


def address_space_is_limited() -> bool:
    """Whether `ulimit -v` is set, so that allocations can fail while there is free memory."""
    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY


@contextlib.contextmanager
def no_collection(*, keep: bool = False) -> Iterator[None]:
    """Stop the search for reference cycles meanwhile: large headers make none and imports few, and
    a fifth of the time would go there.

    Args:
        keep: never search what exists at the end; for what lives as long as the process.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
        if keep:
            gc.freeze()
    finally:
        if was_on:
            gc.enable()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error``, or what it came from, says that memory was missing."""
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        seen.append(cause)
        cause = cause.__cause__ or cause.__context__
    return any(map(_says_no_memory, seen))


def says_no_memory(text: str) -> bool:
    """Whether ``text``, the last output of a library, says that memory was missing."""
    return _NO_MEMORY.search(text) is not None


def memory_error(
    error: BaseException, who: str, *, where: str = "", hint: str = ""
) -> ResourceError | None:
    """Return the error for the user when ``error`` says that ``who`` had too little memory; None
    when it says something else. ``where`` says how far the work was.
    """
    if not is_out_of_memory(error):
        return None
    at = f" {where}" if where else ""
    reason = f": {text}" if (text := one_line(error)) else ""
    return ResourceError(
        "E_OUT_OF_MEMORY",
        f"{who} ran out of memory{at}{reason}; it may have {format_size(limit_bytes())}",
        hint=hint or "use a machine with more memory, or raise the limit (`ulimit -v`, a cgroup)",
    )


def _says_no_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    return isinstance(error, Exception) and says_no_memory(str(error))


def _cgroup_limits(process: Path) -> Iterator[int]:
    """Yield the limit of each control group of ``process`` that has one."""
    try:
        groups = (process / "cgroup").read_text().splitlines()
        mounts = (process / "mountinfo").read_text().splitlines()
    except OSError:
        return  # not Linux
    for group in groups:
        _, controllers, path = group.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        kind = "cgroup" if controllers else "cgroup2"
        for mount in mounts:
            for folder in _folders(mount, kind, path):
                yield from _limit_in(folder)


def _folders(mount: str, kind: str, path: str) -> Iterator[Path]:
    """Yield the folders of the group ``path`` and of its parents below ``mount``, a line of
    mountinfo; nothing when it is of another ``kind``.
    """
    where, _, what = mount.partition(" - ")
    fields, (found, _, options) = where.split(), what.split(maxsplit=2)
    if found != kind or (kind == "cgroup" and "memory" not in options.split(",")):
        return
    root, point = PurePosixPath(fields[3]), Path(fields[4])
    group = PurePosixPath(path)
    inside = group.relative_to(root) if group.is_relative_to(root) else PurePosixPath()
    yield point / inside
    yield from (point / outer for outer in inside.parents)


def _limit_in(folder: Path) -> Iterator[int]:
    for name in ("memory.max", "memory.limit_in_bytes"):
        # each version of cgroups has one of them; `max` is no limit
        with contextlib.suppress(OSError, ValueError):
            yield int((folder / name).read_text())
