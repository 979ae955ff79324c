"""The server's end of the engine's process: the engine's steps and the server's event loop never
wait for one another's Python.

The two ends talk over a socket pair. The engine ends when the socket does, so it never outlives the
server.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import signal
import subprocess
import time
import uuid
from collections.abc import AsyncIterator, Callable

from qtool.engine.outputs import CompletionOutput, merge_by_index
from qtool.engine.sampling_params import SamplingParams
from qtool.errors import QtoolError, ResourceError, from_wire
from qtool.serve.backend.engine_child import END_TIMEOUT_S, EngineChild
from qtool.serve.backend.messages import (
    LENGTH,
    Abort,
    Cancel,
    EngineInfo,
    EngineStats,
    Failed,
    FlushCache,
    FromEngine,
    GetStats,
    KeyedOutput,
    Outputs,
    Ready,
    Stats,
    Submission,
    Submit,
    ToEngine,
    decode_from_engine,
    encode,
)

LOG = logging.getLogger("qtool.serve")
MAX_MERGED = 64  # outputs that are merged at once
STACK_S = 1.0  # for the engine to write its stack
WARM_UP_TOKENS = 2
WATCH_S = 5.0  # the longest interval of the watchdog


class OutputStream:
    """The outputs of the submissions of one request, as they come; a reader that is slower than
    the engine gets those that came together as one.
    """

    def __init__(self, key: int, completions: int) -> None:
        self.first_of = {key: 0}
        """By submission: the index of its first completion among all."""
        self.running = completions
        """Completions that the engine still computes."""
        self._outputs: list[CompletionOutput] = []
        self._error: QtoolError | None = None
        self._waiter: asyncio.Future[None] | None = None
        """Of the reader that waits. A future for each wait takes a fifth of an `asyncio.Event`."""

    def put(self, output: CompletionOutput, key: int | None = None) -> None:
        """Accept an output of the engine, for the submission ``key``."""
        if key is not None:
            output.index += self.first_of[key]
        self._outputs.append(output)
        if output.finish is not None:
            self.running -= 1
        self._wake()

    def fail(self, error: QtoolError) -> None:
        """Let the reader's next wait raise ``error``."""
        self._error = error
        self._wake()

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def _wait(self) -> None:
        """Wait for an output, or an error."""
        if not self._outputs and self._error is None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    async def __aiter__(self) -> AsyncIterator[list[CompletionOutput]]:
        """Yield lists of outputs, at most one of each completion.

        Raises: QtoolError, what went wrong in the engine.
        """
        while self.running or self._outputs:
            if not self._outputs:
                await self._wait()
            if self._error is not None:
                raise self._error
            while self._outputs:
                outputs = self._outputs[:MAX_MERGED]
                del self._outputs[:MAX_MERGED]
                yield outputs if len(outputs) == 1 else merge_by_index(outputs)
                if self._outputs:
                    await asyncio.sleep(0)  # others get their turn before the rest is merged

    async def wait(self, timeout_s: float) -> None:
        """Wait for the first output, but at most ``timeout_s``.

        Raises: QtoolError, what went wrong in the engine.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._wait()
        if self._error is not None:
            raise self._error

    async def collect(self) -> list[CompletionOutput]:
        """Wait for all completions, and return one output of each, in order.

        Raises: QtoolError, what went wrong in the engine.
        """
        outputs = [output async for outputs in self for output in outputs]
        return sorted(merge_by_index(outputs), key=lambda output: output.index)


class EngineProcess:
    """The engine's process, as the server sees it.

    Args:
        child: the process, which is loading the model.
        on_end: called with the reason when the engine ends by itself, or hangs and is ended.
        watchdog_timeout_s: seconds without a step after which an engine that has work hangs.
    """

    def __init__(
        self,
        child: EngineChild,
        on_end: Callable[[QtoolError], None],
        *,
        watchdog_timeout_s: float,
    ) -> None:
        self._child = child
        self._on_end = on_end
        self._watchdog_timeout_s = watchdog_timeout_s
        self._streams: dict[int, OutputStream] = {}
        self._stats: dict[int, asyncio.Future[EngineStats]] = {}
        self._keys = itertools.count()
        self._closing = False
        self.error: QtoolError | None = None
        """Why the engine answers no more."""
        self._writer: asyncio.StreamWriter | None = None
        self._listening: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None

    async def wait_ready(self) -> EngineInfo:
        """Wait until the model is loaded, and return what the engine reports.

        Raises: what `qtool.Engine` raises.
        """
        process = self._child.process
        reader, self._writer = await asyncio.open_connection(sock=self._child.connection)
        try:
            message = await _receive(reader)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise await _death(process) from error
        if isinstance(message, Failed):
            raise from_wire(dict(message.error))
        assert isinstance(message, Ready)
        self._listening = asyncio.create_task(self._listen(reader, process))
        self._watching = asyncio.create_task(self._watch(process))
        return message.info

    def submit(self, *submissions: Submission) -> OutputStream:
        """Hand ``submissions`` to the engine, whose completions are counted in their order.

        A caller that stops reading the outputs must `cancel` them. Raises: ResourceError, when the
        engine is gone.
        """
        if self.error is not None:
            raise self.error
        keys = [next(self._keys) for _ in submissions]
        stream = OutputStream(keys[0], sum(one.completions for one in submissions))
        first = 0
        for key, submission in zip(keys, submissions, strict=True):
            stream.first_of[key] = first
            first += submission.completions
            self._streams[key] = stream
            self._send(Submit(key, submission))
        return stream

    def cancel(self, stream: OutputStream) -> None:
        """End what still runs of the submissions of ``stream``, whose outputs nobody reads."""
        for key in stream.first_of:
            if self._streams.pop(key, None) and stream.running:
                self._send(Cancel(key))

    def abort(self, rid: str | None = None) -> None:
        """End the submissions named ``rid``, or all of them: each completion ends with what it
        has.
        """
        self._send(Abort(rid))

    def flush_cache(self) -> None:
        """Let no submission after this call find pages of those before it."""
        self._send(FlushCache())

    def fail_all(self, error: QtoolError) -> None:
        """Stop waiting for the engine: every reader gets ``error``, now and from now on."""
        self.error = error
        for stream in self._streams.values():
            stream.fail(error)
        for future in self._stats.values():
            if not future.done():
                future.set_exception(TimeoutError())

    async def stats(self, *, timeout_s: float) -> EngineStats:
        """Return what the engine is doing. Raises: TimeoutError."""
        if self.error is not None:
            raise TimeoutError
        key = next(self._keys)
        future = self._stats[key] = asyncio.get_running_loop().create_future()
        try:
            self._send(GetStats(key))
            return await asyncio.wait_for(future, timeout_s)
        finally:
            del self._stats[key]

    async def close(self) -> None:
        """End the process, whatever it does, and wait for it."""
        self._closing = True
        if self._watching is not None:
            self._watching.cancel()
        if self._writer is None:
            self._child.connection.close()
        else:
            self._writer.close()  # the engine ends with its socket
        await asyncio.to_thread(self._child.wait)
        if self._listening is not None:
            # it ends with the connection, and may be about to report why the engine ended
            await asyncio.wait({self._listening}, timeout=END_TIMEOUT_S)
            self._listening.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._listening

    async def _listen(self, reader: asyncio.StreamReader, process: subprocess.Popen[bytes]) -> None:
        try:
            while True:
                self._handle(await _receive(reader))
                await asyncio.sleep(0)  # others get their turn if more messages are there already
        except Exception as error:  # of the connection, or of a message that cannot be read
            if self._closing or self.error is not None:
                return
            if not isinstance(error, (asyncio.IncompleteReadError, ConnectionError)):
                LOG.exception("a message of the engine cannot be read")
                process.kill()
            self.fail_all(
                ResourceError(
                    "E_ENGINE_DIED", "the engine's process ended", hint="the server ends, too"
                )
            )
            self._on_end(await _death(process))

    async def _watch(self, process: subprocess.Popen[bytes]) -> None:
        """End an engine that hangs. Each interval counts for its nominal length at most, so that a
        pause of the whole machine does not count as a hang.
        """
        steps = -1
        hung_s = 0.0
        interval_s = min(self._watchdog_timeout_s / 10, WATCH_S)
        while hung_s < self._watchdog_timeout_s:
            began = time.monotonic()
            await asyncio.sleep(interval_s / 2)
            before = steps
            has_work = any(stream.running for stream in self._streams.values())
            if has_work:
                with contextlib.suppress(TimeoutError):
                    steps = (await self.stats(timeout_s=interval_s / 2)).steps
            hangs = has_work and steps == before
            hung_s = hung_s + min(time.monotonic() - began, interval_s) if hangs else 0.0
        if not self._closing and self.error is None:
            await self._end_hung(process)

    async def _end_hung(self, process: subprocess.Popen[bytes]) -> None:
        """Fail all requests, let the engine write its stack to the log, and kill it."""
        error = ResourceError(
            "E_ENGINE_HANGS",
            f"the engine has made no step for {self._watchdog_timeout_s:g} s though it has work",
            hint="the log has its stack; --watchdog-timeout gives it more time",
        )
        self.fail_all(error)
        LOG.error("%s; the stack of its threads follows", error.message)
        process.send_signal(signal.SIGUSR1)
        process.send_signal(signal.SIGCONT)  # it may have been stopped
        await asyncio.sleep(STACK_S)
        process.kill()
        self._on_end(error)

    def _handle(self, message: FromEngine) -> None:
        if isinstance(message, Outputs):
            for output in message.outputs:
                self._hand_out(output)
        elif isinstance(message, Stats):
            future = self._stats.get(message.key)
            if future is not None and not future.done():
                future.set_result(message.stats)

    def _hand_out(self, keyed: KeyedOutput) -> None:
        stream = self._streams.get(keyed.key)
        if stream is None:
            return  # it was cancelled
        if isinstance(keyed.output, CompletionOutput):
            stream.put(keyed.output, keyed.key)
        else:
            stream.fail(from_wire(dict(keyed.output)))

    def _send(self, message: ToEngine) -> None:
        if self.error is None and self._writer is not None:
            self._writer.write(encode(message))


async def answer_once(engine: EngineProcess, info: EngineInfo) -> None:
    """Send the model one short prompt, and wait for its answer.

    Raises: QtoolError, when its logits are not finite or the engine is gone.
    """
    prompt = [info.eos_ids[0] if info.eos_ids else 0]
    params = SamplingParams(max_new_tokens=WARM_UP_TOKENS, temperature=0.0, ignore_eos=True)
    rid = f"warm-up-{uuid.uuid4().hex}"
    stream = engine.submit(Submission([prompt], params, stream=False, rid=rid))
    try:
        await stream.collect()
    finally:
        engine.cancel(stream)


async def _receive(reader: asyncio.StreamReader) -> FromEngine:
    (size,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
    return decode_from_engine(await reader.readexactly(size))


async def _death(process: subprocess.Popen[bytes]) -> ResourceError:
    """Wait for ``process`` and return why it ended."""
    code = await asyncio.to_thread(process.wait)
    if code == -signal.SIGKILL:
        hint = "it was killed, perhaps for memory: lower mem-fraction-static or max-total-tokens"
    else:
        hint = "see what it printed last"
    return ResourceError("E_ENGINE_DIED", f"the engine's process ended with {code}", hint=hint)
