"""Run one function on untrusted text in a child process with limits. `Sandbox` is the parent's end,
`blocking` has one for callers without an event loop, `forked` one that starts at once; `child` is
the other end.

Both ends send lines of JSON over a socket pair; what a child sends is never unpickled. Time, memory
and output are limited. The child's environment holds no secrets, but the child is not a jail: code
that escapes from the function has the rights of the user.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from qtool.sandbox.child import to_line

MAX_WAITING = 4096
OUTPUT_BYTES = 16 << 20
START_TIMEOUT_S = 60.0  # imports from a cold disk
PASSED_VARIABLES = (
    "PATH",
    "HOME",
    "TMPDIR",
    "TZ",
    "LANG",
    "LC_ALL",
    "LC_CTYPE",
    "PYTHONPATH",
    "PYTHONHOME",
    "LD_LIBRARY_PATH",
    "DYLD_LIBRARY_PATH",
)
ADDED_VARIABLES = {
    # the child needs neither a device nor the network
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    # each thread and arena reserves memory that it may never use
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
}


class SandboxError(Exception):
    """A call has no result."""


class LimitExceeded(SandboxError):
    """The call exceeded its ``limit``: ``time``, ``memory`` or ``output``."""

    def __init__(self, limit: str, message: str) -> None:
        super().__init__(message)
        self.limit = limit


class CallRaised(SandboxError):
    """The function raised an exception: ``name`` is its class, ``message`` one line."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}")
        self.name = name
        self.message = message


class ChildDied(SandboxError):
    """The child ended during the call, could not be started, or was closed."""


class TooManyWaiting(SandboxError):
    """The queue of calls is full."""


class Sandbox:
    """One function in one child process, which starts at the first call, serves calls in order, and
    is replaced if it ends or exceeds a limit.

    Args:
        function: ``module:function``, imported in the child. Its arguments and its
            result are JSON.
        init: another such name and its arguments, called once in each child before the first call,
            without the limits.
        timeout_s: seconds for one call, from when the child starts on it.
        memory_bytes: what the child may allocate after ``init``. The limit is on address space,
            which the system refuses at once and to any library; Linux only.
        output_bytes: of a result, as JSON.
        start_timeout_s: seconds for imports and ``init``.
        max_waiting: calls that may wait while one runs.
        environment: variables that the child gets besides `PASSED_VARIABLES`.
    """

    def __init__(
        self,
        function: str,
        *,
        init: Sequence[object] = (),
        timeout_s: float,
        memory_bytes: int,
        output_bytes: int = OUTPUT_BYTES,
        start_timeout_s: float = START_TIMEOUT_S,
        max_waiting: int = MAX_WAITING,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._setup = to_line(
            {
                "function": function,
                "init": list(init),
                "memory_bytes": memory_bytes,
                "output_bytes": output_bytes,
            }
        )
        self._timeout_s = timeout_s
        self._output_bytes = output_bytes
        self._start_timeout_s = start_timeout_s
        self._max_waiting = max_waiting
        self._environment = environment or {}
        self._waiting: deque[_Call] = deque()
        self._arrived = asyncio.Event()
        self._child: _Child | None = None
        self._serving: asyncio.Task[None] | None = None
        self._closed = False

    async def call(self, *args: object, timeout_s: float | None = None) -> object:
        """Return the function's result for ``args``. Cancelling it does not disturb other calls.

        Args:
            args: as JSON knows them.
            timeout_s: seconds for this call, in place of those of the sandbox.
        Raises: LimitExceeded, CallRaised, ChildDied, TooManyWaiting.
        """
        try:
            line = to_line(args)
        except RecursionError:
            raise CallRaised("RecursionError", "the arguments are nested too deeply") from None
        return await self.call_with(line, timeout_s=timeout_s)

    async def call_with(self, line: bytes, *, timeout_s: float | None = None) -> object:
        """Return the function's result for the arguments in ``line``, a JSON array that ends with a
        line break. Cancelling it does not disturb other calls.

        Raises: LimitExceeded, CallRaised, ChildDied, TooManyWaiting.
        """
        if self._closed:
            raise ChildDied("the sandbox is closed")
        if len(self._waiting) >= self._max_waiting:
            raise TooManyWaiting(f"{len(self._waiting)} calls are waiting")
        answer = asyncio.get_running_loop().create_future()
        call = _Call(line, timeout_s or self._timeout_s, answer)
        self._waiting.append(call)
        self._arrived.set()
        if self._serving is None:
            self._serving = asyncio.create_task(self._serve())
        try:
            return await call.answer
        finally:
            with contextlib.suppress(ValueError):  # it is no longer waiting
                self._waiting.remove(call)

    async def close(self) -> None:
        """End the child, and every call with ChildDied."""
        self._closed = True
        if self._serving is not None:
            self._serving.cancel()
            await asyncio.wait([self._serving])
        for call in self._waiting:
            call.fail(ChildDied("the sandbox was closed"))
        await self._end_child()

    async def _serve(self) -> None:
        while True:
            while not self._waiting:
                self._arrived.clear()
                await self._arrived.wait()
            call = self._waiting.popleft()
            try:
                child = self._child
                if child is None or not child.is_alive():
                    child = await self._start_child()
                result = await child.ask(call.line, call.timeout_s)
            except CallRaised as error:
                call.fail(error)
            except Exception as error:
                call.fail(error)
                # if this fails, the next call tries again, and gets the reason
                with contextlib.suppress(Exception):
                    await self._start_child()
            else:
                call.succeed(result)
            finally:
                call.fail(ChildDied("the sandbox was closed"))  # unless it has an answer

    async def _start_child(self) -> _Child:
        await self._end_child()
        self._child = await _Child.start(self._output_bytes, self._environment)
        try:
            await self._child.ask(self._setup, self._start_timeout_s)
        except SandboxError as error:
            await self._end_child()
            raise ChildDied(f"the process did not start: {error}") from error
        return self._child

    async def _end_child(self) -> None:
        if self._child is not None:
            await self._child.end()
            self._child = None


class _Call:
    """The arguments of one call, its limit, and where its answer goes."""

    def __init__(self, line: bytes, timeout_s: float, answer: asyncio.Future[object]) -> None:
        self.line = line
        self.timeout_s = timeout_s
        self.answer = answer

    def succeed(self, result: object) -> None:
        if not self.answer.done():
            self.answer.set_result(result)

    def fail(self, error: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


class _Child:
    """A child process and our end of its connection."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer

    @classmethod
    async def start(cls, output_bytes: int, extra: Mapping[str, str]) -> _Child:
        """Start a process; its function is not loaded yet. Raises: ChildDied."""
        code = code_of_main("qtool.sandbox.child")
        environment = {**passed_variables(), **ADDED_VARIABLES, **extra}
        try:
            ours, theirs = socket.socketpair()
            with theirs:
                reader, writer = await asyncio.open_unix_connection(sock=ours, limit=output_bytes)
                try:
                    process = subprocess.Popen(
                        [sys.executable, "-P", "-c", code],
                        stdin=theirs.fileno(),
                        stdout=subprocess.DEVNULL,  # libraries may print prompts
                        stderr=subprocess.DEVNULL,
                        env=environment,
                        # signals of the terminal are for the server
                        start_new_session=True,
                    )
                except BaseException:
                    writer.close()
                    raise
        except OSError as error:
            raise ChildDied(f"the child process cannot be started: {error}") from error
        return cls(process, reader, writer)

    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    async def ask(self, line: bytes, timeout_s: float) -> object:
        """Send ``line`` and return the result.

        After any error but CallRaised the child cannot be used again.
        """
        try:
            async with asyncio.timeout(timeout_s):
                self._writer.write(line)
                await self._writer.drain()
                answer = await self._reader.readline()
        except TimeoutError:
            raise LimitExceeded("time", f"it took more than {timeout_s:g} s") from None
        except ValueError:  # the child did not keep the limit itself
            raise LimitExceeded("output", "its result is too long") from None
        except OSError:
            answer = b""
        if not answer.endswith(b"\n"):
            await self.end()
            raise ChildDied(f"the child process {describe_exit(self._process.returncode)}")
        return result_in(answer)

    async def end(self) -> None:
        """Kill the process and wait until it is gone."""
        self._process.kill()
        self._writer.transport.abort()
        await asyncio.to_thread(self._process.wait)


def code_of_main(module: str, *arguments: int) -> str:
    """Return Python code that calls the ``main`` of ``module`` with ``arguments``, for an
    interpreter whose environment need not have qtool.
    """
    parent = str(Path(__file__).resolve().parents[2])
    given = ", ".join(map(str, arguments))
    return f"import sys; sys.path.append({parent!r}); from {module} import main; main({given})"


def passed_variables() -> dict[str, str]:
    """Return the environment variables of this process that a child gets."""
    return {name: os.environ[name] for name in PASSED_VARIABLES if name in os.environ}


def result_in(answer: bytes) -> object:
    """Return the result in the line that a child sent.

    Raises: CallRaised, LimitExceeded, ChildDied.
    """
    try:
        value: object = json.loads(answer)
    except (ValueError, RecursionError):
        value = None
    match value:
        case {"result": result}:
            return result
        case {"raised": [str(name), str(message)]}:
            raise CallRaised(name, message)
        case {"limit": [str(limit), str(message)]}:
            raise LimitExceeded(limit, message)
    raise ChildDied("the child process sent an invalid answer")


def describe_exit(status: int) -> str:
    """Return how a child with the exit code ``status`` ended, as the end of a sentence."""
    if status == -signal.SIGKILL:
        return "was killed, most likely for memory"
    return (
        f"was ended by {signal.Signals(-status).name}"
        if status < 0
        else f"ended with exit code {status}"
    )
