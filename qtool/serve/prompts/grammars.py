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
from qtool.serve.prompts.pool import SandboxPool
from qtool.serve.turns import current_origin

TIMEOUT_S = 10.0
MEMORY_BYTES = 1 << 30
MAX_WAITING = 64
MAX_WAITING_EACH = 16  # of one client
CACHE_BYTES = 64 << 20

Compiled = str | UsageError


class _Compilation:
    """A compilation that runs or is queued, and how many requests of one client wait for it."""

    def __init__(self, task: asyncio.Task[Compiled]) -> None:
        self.task = task
        self.waiters = 0


class Grammars:
    """Compiles grammars for the vocabulary of ``info``; a child starts with the first one.

    A compilation that nobody waits for any more is cancelled.
    """

    def __init__(self, info: EngineInfo) -> None:
        self._info = info
        self._pool: SandboxPool | None = None
        self._cache: LRUCache[tuple[str, str], Compiled] = LRUCache(CACHE_BYTES, getsizeof=_size)
        self._compiling: dict[tuple[str, str, str], _Compilation] = {}
        """By client and grammar, so that no client waits for the turn of another."""

    @property
    def can_compile(self) -> bool:
        """Whether there is what grammars need: a tokenizer, and xgrammar."""
        return bool(self._info.tokenizer) and importlib.util.find_spec("xgrammar") is not None

    async def compiled(self, kind: str, text: str) -> str:
        """Return what `Compiler.take` reads.

        Raises: UsageError, if the grammar cannot be compiled; ResourceError; TooManyWaiting.
        """
        if not self.can_compile:
            raise UsageError(
                "E_NO_XGRAMMAR",
                "this server cannot constrain answers",
                hint="it needs a tokenizer, and `pip install 'qtool[grammar]'`",
            )
        result = self._cache.get((kind, text))
        if result is None:
            result = await self._compile_once(kind, text)
        if isinstance(result, UsageError):
            raise UsageError(result.code, result.message, hint=result.hint)
        return result

    async def close(self) -> None:
        """End the child processes."""
        if self._pool is not None:
            await self._pool.close()

    async def _compile_once(self, kind: str, text: str) -> Compiled:
        """Compile the grammar, or wait for a compilation that the same client started."""
        key = (current_origin().client, kind, text)
        compilation = self._compiling.get(key)
        if compilation is None:
            compilation = _Compilation(asyncio.create_task(self._compile(kind, text)))
            self._compiling[key] = compilation
        compilation.waiters += 1
        try:
            return await asyncio.shield(compilation.task)
        finally:
            compilation.waiters -= 1
            if not compilation.waiters:
                compilation.task.cancel()
                del self._compiling[key]

    async def _compile(self, kind: str, text: str) -> Compiled:
        """Return the compiled grammar, or the error, and cache it."""
        result = await self._compile_in_pool(kind, text)
        self._cache[kind, text] = result
        return result

    async def _compile_in_pool(self, kind: str, text: str) -> Compiled:
        if self._pool is None:
            self._pool = SandboxPool(
                self._make_sandbox,
                ("regex", "a"),
                max_waiting=MAX_WAITING,
                max_waiting_each=MAX_WAITING_EACH,
            )
        try:
            return str(await self._pool.call(kind, text))
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
        )


def _size(result: Compiled) -> int:
    """Return about how many bytes a cached result takes, its grammar included."""
    size = len(result if isinstance(result, str) else result.message)
    return min(size + MAX_GRAMMAR, CACHE_BYTES)
