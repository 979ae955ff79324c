"""A sandbox for callers without an event loop, or inside one that is not theirs."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

from qtool.sandbox import Sandbox


class BlockingSandbox:
    """A `Sandbox` whose calls return when they are answered; it is closed at the end of ``with``.

    Its event loop has a thread of its own, which lives as long as the child: the system ends a
    child with the thread that started it.
    """

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self._runner = asyncio.Runner()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="qtool-sandbox")

    def call(self, *args: object, timeout_s: float) -> object:
        """Return the function's result for ``args``. Raises: as `Sandbox.call`."""

        async def call() -> object:
            return await self._sandbox.call(*args, timeout_s=timeout_s)

        return self._thread.submit(lambda: self._runner.run(call())).result()

    def __enter__(self) -> BlockingSandbox:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        def close() -> None:
            self._runner.run(self._sandbox.close())
            self._runner.close()

        self._thread.submit(close).result()
        self._thread.shutdown()
