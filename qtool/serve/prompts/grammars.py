"""Grammars of requests, compiled in a `Sandbox`, because some take too much time or memory. The
last results are cached, errors too.
"""

from __future__ import annotations

import asyncio
import importlib.util

from cachetools import LRUCache

from qtool.engine.sampling_params import MAX_GRAMMAR
from qtool.errors import ResourceError, UsageError
from qtool.sandbox import (
    CallRaised,
    LimitExceeded,
    Sandbox,
    SandboxError,
    TooManyWaiting,
)
from qtool.serve.backend.messages import EngineInfo

TIMEOUT_S = 10.0
MEMORY_BYTES = 1 << 30
MAX_WAITING = 64
CACHE_BYTES = 64 << 20

Compiled = str | UsageError


class Grammars:
    """Compiles grammars for the vocabulary of ``info``; the child starts with the first one."""

    def __init__(self, info: EngineInfo) -> None:
        self._info = info
        self._sandbox: Sandbox | None = None
        self._cache: LRUCache[tuple[str, str], Compiled] = LRUCache(CACHE_BYTES, getsizeof=_size)
        self._compiling: dict[tuple[str, str], asyncio.Task[Compiled]] = {}

    async def compiled(self, kind: str, text: str) -> str:
        """Return what `Compiler.take` reads.

        Raises: UsageError, if the grammar cannot be compiled; ResourceError; TooManyWaiting.
        """
        if not self._info.tokenizer or importlib.util.find_spec("xgrammar") is None:
            raise UsageError(
                "E_NO_XGRAMMAR",
                "this server cannot constrain answers",
                hint="it needs a tokenizer, and `pip install 'qtool[grammar]'`",
            )
        result = self._cache.get((kind, text))
        if result is None:
            # shielded, because others may wait for the same
            result = await asyncio.shield(self._start_compiling(kind, text))
        if isinstance(result, UsageError):
            raise UsageError(result.code, result.message, hint=result.hint)
        return result

    async def close(self) -> None:
        """End the child process."""
        if self._sandbox is not None:
            await self._sandbox.close()

    def _start_compiling(self, kind: str, text: str) -> asyncio.Task[Compiled]:
        """Return the task that compiles the grammar, which may be running already."""
        task = self._compiling.get((kind, text))
        if task is None:
            task = asyncio.create_task(self._compile(kind, text))
            task.add_done_callback(lambda done: self._finish(kind, text, done))
            self._compiling[kind, text] = task
        return task

    async def _compile(self, kind: str, text: str) -> Compiled:
        if self._sandbox is None:
            self._sandbox = self._make_sandbox()
        try:
            return str(await self._sandbox.call(kind, text))
        except CallRaised as error:
            return UsageError(
                "E_GRAMMAR",
                error.message,
                hint="xgrammar's documentation says what a grammar may contain",
            )
        except LimitExceeded as error:
            return UsageError(
                "E_GRAMMAR", f"the grammar cannot be compiled: {error}", hint="make it smaller"
            )
        except TooManyWaiting:
            raise
        except SandboxError as error:
            raise ResourceError(
                "E_GRAMMAR_PROCESS", f"compiling the grammar failed: {error}", hint="try again"
            ) from None

    def _make_sandbox(self) -> Sandbox:
        init = (
            "qtool.engine.grammar:load",
            self._info.tokenizer,
            self._info.vocab_size,
            list(self._info.eos_ids),
        )
        return Sandbox(
            "qtool.engine.grammar:compile_to_json",
            init=init,
            timeout_s=TIMEOUT_S,
            memory_bytes=MEMORY_BYTES,
            max_waiting=MAX_WAITING,
        )

    def _finish(self, kind: str, text: str, task: asyncio.Task[Compiled]) -> None:
        del self._compiling[kind, text]
        if not task.cancelled() and task.exception() is None:
            self._cache[kind, text] = task.result()


def _size(result: Compiled) -> int:
    """Return about how many bytes a cached result takes, its grammar included."""
    size = len(result if isinstance(result, str) else result.message)
    return min(size + MAX_GRAMMAR, CACHE_BYTES)
