"""A sandbox that is forked from this process: it starts at once, with all modules imported."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Mapping

from qtool.sandbox import ChildDied, LimitExceeded, describe_exit, passed_variables, result_in
from qtool.sandbox.child import serve, to_line


class ForkedSandbox:
    """One function in one child process, forked from this one. The child ends with ``with``, or
    with this process. Other threads of this process must hold no locks.

    Args:
        function: its arguments and its result are JSON.
        memory_bytes: what the child may allocate. The limit is on address space; Linux only.
        output_bytes: of a result, as JSON.
        environment: variables that the child gets besides `PASSED_VARIABLES`.
    """

    def __init__(
        self,
        function: Callable[..., object],
        *,
        memory_bytes: int,
        output_bytes: int,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._output_bytes = output_bytes
        self._socket, theirs = socket.socketpair()
        try:
            self._pid = os.fork()
        except OSError as error:
            self._socket.close()
            raise ChildDied(f"the child process cannot be started: {error}") from error
        finally:
            if getattr(self, "_pid", -1) != 0:
                theirs.close()
        if self._pid == 0:
            try:
                self._socket.close()
                variables = {**passed_variables(), **(environment or {})}
                os.environ.clear()
                os.environ.update(variables)
                serve(theirs, function, memory_bytes=memory_bytes, output_bytes=output_bytes)
            finally:
                os._exit(0)

    def call(self, *args: object, timeout_s: float) -> object:
        """Return the function's result for ``args``. Only CallRaised leaves a child that takes
        further calls.

        Raises: LimitExceeded, CallRaised, ChildDied.
        """
        try:
            self._socket.sendall(to_line(args))
            answer = self._answer(time.monotonic() + timeout_s)
        except TimeoutError:
            raise LimitExceeded("time", f"it took more than {timeout_s:g} s") from None
        except OSError:
            answer = b""
        if not answer.endswith(b"\n"):
            raise ChildDied(f"the child process {describe_exit(self._end())}")
        return result_in(answer)

    def _answer(self, deadline: float) -> bytes:
        chunks: list[bytes] = []
        size = 0
        while not chunks or not chunks[-1].endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._socket], [], [], left)[0]:
                raise TimeoutError
            chunk = self._socket.recv(1 << 20)
            size += len(chunk)
            if size > self._output_bytes:
                raise LimitExceeded("output", "its result is too long")
            if not chunk:
                break
            chunks.append(chunk)
        return b"".join(chunks)

    def _end(self) -> int:
        """Wait for the child and return its exit code, negative for a signal as in `subprocess`."""
        pid, self._pid = self._pid, 0
        if not pid:
            return 0
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def __enter__(self) -> ForkedSandbox:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            self._end()
        self._socket.close()
