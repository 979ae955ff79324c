"""How much memory a process may have, by the machine and by its control groups; errors that speak
of memory.
"""

from __future__ import annotations

import errno
import os

import pytest

from qtool.memory import is_out_of_memory, limit_bytes, memory_error

MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
V2 = "30 20 0:26 {root} {mount} rw,nosuid - cgroup2 cgroup2 rw"
V1 = "35 31 0:32 {root} {mount} rw,relatime - cgroup cgroup rw,memory"
OTHER = "32 31 0:29 / {mount} rw,relatime - cgroup cgroup rw,cpu"
MIB = 1 << 20


@pytest.fixture
def limit_of(tmp_path):
    """A function that writes a process's control groups and returns the process's limit."""

    def limit_of(mount: str, group: str, limits: dict[str, str], root: str = "/") -> int:
        mounted = tmp_path / "cgroup"
        for name, text in limits.items():
            (mounted / name).parent.mkdir(parents=True, exist_ok=True)
            (mounted / name).write_text(f"{text}\n")
        (tmp_path / "cgroup.txt").write_text("")
        process = tmp_path / "self"
        process.mkdir()
        (process / "cgroup").write_text(f"3:cpu:/elsewhere\n{group}\n")
        (process / "mountinfo").write_text(mount.format(mount=mounted, root=root) + "\n")
        return limit_bytes(process)

    return limit_of


@pytest.mark.parametrize(
    ("mount", "group", "limits", "root", "expected"),
    [
        (V2, "0::/", {"memory.max": "max"}, "/", MACHINE),
        (V2, "0::/", {"memory.max": str(512 * MIB)}, "/", 512 * MIB),
        (V2, "0::/a/b", {"a/b/memory.max": "max", "a/memory.max": str(MIB)}, "/", MIB),
        (V2, "0::/a/b", {"a/b/memory.max": str(MIB), "a/memory.max": str(9 * MIB)}, "/", MIB),
        (V2, "0::/docker/x", {"memory.max": str(MIB)}, "/docker/x", MIB),  # a container sees itself
        (V2, "0::/../other", {"memory.max": str(MIB)}, "/docker/x", MIB),
        (V1, "4:memory:/a/b", {"a/memory.limit_in_bytes": str(MIB)}, "/", MIB),
        (V1, "4:cpu,memory:/", {"memory.limit_in_bytes": "9223372036854771712"}, "/", MACHINE),
        (OTHER, "4:memory:/", {"memory.limit_in_bytes": str(MIB)}, "/", MACHINE),
    ],
)
def test_the_least_limit_of_machine_and_groups_holds(
    limit_of, mount, group, limits, root, expected
):
    assert limit_of(mount, group, limits, root) == expected


def test_where_there_are_no_groups_the_machine_is_the_limit(tmp_path):
    assert limit_bytes(tmp_path) == MACHINE


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
        ImportError("libx.so: failed to map segment from shared object"),
        RuntimeError("unable to mmap 5 bytes from file <x>: Cannot allocate memory (12)"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("can't start new thread"),
        type("OutOfMemoryError", (RuntimeError,), {})("CUDA"),
    ],
    ids=repr,
)
def test_an_error_that_speaks_of_memory_is_one_of_resources(error):
    assert memory_error(error, "x").exit_code == 4
    outer = ValueError("cannot import torch")
    outer.__cause__ = error
    assert is_out_of_memory(outer)


def test_other_errors_are_none_of_memory():
    assert memory_error(ValueError("memory layout is contiguous"), "x") is None
    assert memory_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "x") is None
