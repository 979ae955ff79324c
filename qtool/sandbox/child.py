"""The child's end of a sandbox: one function, called with lines of JSON."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypedDict

from qtool.errors import one_line

MAX_NAME = 100
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class _Setup(TypedDict):
    """The first line to a child."""

    function: str
    init: list[object]
    memory_bytes: int
    output_bytes: int


def main() -> None:
    """Run the child: load the function that the first line names, then answer each further line
    until the other end is closed.
    """
    connection = socket.socket(fileno=os.dup(0))
    with Path(os.devnull).open() as nothing:
        os.dup2(nothing.fileno(), 0)
    _settle()
    lines = connection.makefile("rb")
    if first := lines.readline():
        setup: _Setup = json.loads(first)
        limit = setup["output_bytes"]
        connection.sendall(_run(partial(_load, setup), output_bytes=limit))
        for line in lines:
            call = partial(_call, setup["function"], line)
            connection.sendall(_run(call, output_bytes=limit))


def serve(
    connection: socket.socket,
    function: Callable[..., object],
    *,
    memory_bytes: int,
    output_bytes: int,
) -> None:
    """Answer each line of ``connection``, in a child that was forked."""
    _settle()
    _limit_memory(memory_bytes)

    def call(line: bytes) -> object:
        return function(*json.loads(line))

    for line in connection.makefile("rb"):
        connection.sendall(_run(partial(call, line), output_bytes=output_bytes))


def _settle() -> None:
    """Make this process end with its parent, and not by the signals that end the parent."""
    # a supervisor may send these to all processes, while the parent still needs this one
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(AttributeError):  # not Linux: the child ends after its call
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


@contextlib.contextmanager
def limited_memory(extra_bytes: int) -> Iterator[None]:
    """Limit what this process may allocate inside ``with`` to ``extra_bytes``."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    if limit := _limit(extra_bytes):
        resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _load(setup: _Setup) -> None:
    _import_function(setup["function"])
    if setup["init"]:
        name, *args = setup["init"]
        _import_function(str(name))(*args)
    _limit_memory(setup["memory_bytes"])


def _call(name: str, line: bytes) -> object:
    return _import_function(name)(*json.loads(line))


def _import_function(name: str) -> Callable[..., object]:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)  # type: ignore[no-any-return]


def _limit_memory(extra_bytes: int) -> None:
    if limit := _limit(extra_bytes):
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _limit(extra_bytes: int) -> int:
    """Return the address space of this process with ``extra_bytes`` more. 0 where it is not known:
    only Linux tells, and only Linux enforces the limit.
    """
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except FileNotFoundError:
        return 0
    limit = pages * resource.getpagesize() + extra_bytes
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    return limit if hard == resource.RLIM_INFINITY else min(limit, hard)


def _run(function: Callable[[], object], *, output_bytes: int) -> bytes:
    """Return the line with the result of ``function``, or with what it raised."""
    try:
        try:
            line = to_line({"result": function()})
        except MemoryError:
            raise
        except BaseException as error:
            message = one_line(error)
            if "bad_alloc" in message:  # C++ libraries report it so
                raise MemoryError from None
            line = to_line({"raised": [type(error).__name__[:MAX_NAME], message]})
    except MemoryError:
        line = b'{"limit": ["memory", "it took too much memory"]}\n'
    if len(line) > output_bytes:
        line = b'{"limit": ["output", "its result is too long"]}\n'
    return line


def to_line(value: object) -> bytes:
    """Return ``value`` as a line of JSON, lone surrogates included."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
