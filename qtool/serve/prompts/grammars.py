"""Grammars of requests, compiled in a `Sandbox`: some would take for ever, or all memory. What came
of those used last is kept, refusals too.
"""

from __future__ import annotations

import asyncio
import importlib.util
from collections import OrderedDict

from qtool.errors import ResourceError, UsageError
from qtool.serve.backend.messages import EngineInfo
from qtool.serve.prompts.sandbox import (
    CallRaised,
    LimitExceeded,
    Sandbox,
    SandboxError,
    TooManyWaiting,
)

TIMEOUT_S, MEMORY_BYTES = 10.0, 1 << 30
MAX_WAITING = 64
KEPT_BYTES = 64 << 20


class Grammars:
    """Compiles for the vocabulary of ``info``. Nothing runs before the first grammar comes."""

    def __init__(self, info: EngineInfo) -> None:
        self._info = info
        self._sandbox: Sandbox | None = None
        # the one used last at the end
        self._kept: OrderedDict[tuple[str, str], str | UsageError] = OrderedDict()
        self._kept_bytes = 0
        self._compiling: dict[tuple[str, str], asyncio.Task[str | UsageError]] = {}

    async def compiled(self, kind: str, text: str) -> str:
        """Return what `Compiler.take` reads.

        Raises: UsageError for what cannot be compiled; ResourceError; TooManyWaiting.
        """
        if not self._info.tokenizer or importlib.util.find_spec("xgrammar") is None:
            raise UsageError(
                "E_NO_XGRAMMAR",
                "this server cannot constrain answers",
                hint="it needs a tokenizer, and `pip install 'qtool[grammar]'`",
            )
        found = self._kept.get((kind, text))
        if found is None:
            compiling = self._compiling.get((kind, text))
            if compiling is None:
                compiling = self._compiling[kind, text] = asyncio.create_task(
                    self._compile(kind, text)
                )
                compiling.add_done_callback(lambda task: self._done(kind, text, task))
            found = await asyncio.shield(compiling)  # others may wait for the same
        else:
            self._kept.move_to_end((kind, text))
        if isinstance(found, UsageError):
            raise UsageError(found.code, found.message, hint=found.hint)
        return found

    async def close(self) -> None:
        """End the child process."""
        if self._sandbox is not None:
            await self._sandbox.close()

    async def _compile(self, kind: str, text: str) -> str | UsageError:
        if self._sandbox is None:
            init = (
                "qtool.engine.grammar:load",
                self._info.tokenizer,
                self._info.vocab_size,
                list(self._info.eos_ids),
            )
            self._sandbox = Sandbox(
                "qtool.engine.grammar:compile_to_json",
                init=init,
                timeout_s=TIMEOUT_S,
                memory_bytes=MEMORY_BYTES,
                max_waiting=MAX_WAITING,
            )
        try:
            return str(await self._sandbox.call(kind, text))
        except CallRaised as error:
            return UsageError(
                "E_GRAMMAR",
                error.message,
                hint="xgrammar's documentation says what a grammar may have",
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

    def _done(self, kind: str, text: str, task: asyncio.Task[str | UsageError]) -> None:
        del self._compiling[kind, text]
        if not task.cancelled() and task.exception() is None:
            self._keep(kind, text, task.result())

    def _keep(self, kind: str, text: str, found: str | UsageError) -> None:
        self._kept_bytes += _size(text, found) - _size(text, self._kept.pop((kind, text), None))
        self._kept[kind, text] = found
        while self._kept_bytes > KEPT_BYTES:
            (_, oldest), what = self._kept.popitem(last=False)
            self._kept_bytes -= _size(oldest, what)


def _size(text: str, found: str | UsageError | None) -> int:
    if found is None:
        return 0
    return len(text) + len(found if isinstance(found, str) else found.message)
