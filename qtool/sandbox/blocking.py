"""A sandbox for callers without an event loop, or inside one that is not theirs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from types import TracebackType
from typing import TypeVar

from qtool.sandbox import Sandbox

T = TypeVar("T")


class BlockingSandbox:
    """A `Sandbox` whose calls return when they are answered; the end of ``with`` closes it, also
    during a call, as when the user interrupts it.

    Its event loop has a thread of its own, which lives as long as the child: the system ends a
    child with the thread that started it.
    """

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="qtool-sandbox", daemon=True
        )

    def call(self, *args: object, timeout_s: float) -> object:
        """Return the function's result for ``args``. Raises: as `Sandbox.call`."""
        return self._run(self._sandbox.call(*args, timeout_s=timeout_s))

    def __enter__(self) -> BlockingSandbox:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._run(self._sandbox.close())
        self._run(self._loop.shutdown_default_executor())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Coroutine[None, None, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()
