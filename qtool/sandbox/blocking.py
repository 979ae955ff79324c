"""A sandbox for callers without an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import TypeVar

from qtool.sandbox import Sandbox

T = TypeVar("T")


class BlockingSandbox:
    """A `Sandbox` whose calls return when they are answered. The end of ``with`` closes it, even
    during a call that the user interrupted.

    Its event loop has a thread of its own, which lives as long as the child: Linux ends a child
    together with the thread that started it.
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

    def __exit__(self, *_: object) -> None:
        self._run(self._sandbox.close())
        self._run(self._loop.shutdown_default_executor())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Coroutine[None, None, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()
