"""Threads for work that would block the event loop: large bodies, texts and replies."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from qtool.serve.turns import Turns, current_origin

# two at least, since one client never has all; the engine needs the other cores
WORKERS = max(2, min(8, (os.cpu_count() or 1) // 2))
MAX_WAITING = 4096
MAX_WAITING_EACH = 1024
SMALL_BYTES = 16 << 10  # less work than this is done at once: a thread is not worth it

P = ParamSpec("P")
R = TypeVar("R")


class Threads:
    """A few threads, which the clients share by `Turns`.

    Python code yields the GIL to the event loop every few milliseconds. A library call that does
    not must be quick.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(WORKERS, thread_name_prefix="qtool-worker")
        self._turns = Turns(WORKERS, max_waiting=MAX_WAITING, max_waiting_each=MAX_WAITING_EACH)

    async def run(
        self, size_bytes: int, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """Return what ``function`` returns. It runs in a thread, or at once if ``size_bytes``, the
        size of its input, is small.

        Raises: TooManyWaiting; what ``function`` raises.
        """
        if size_bytes <= SMALL_BYTES:
            return function(*args, **kwargs)
        client = current_origin().client
        worker = await self._turns.acquire(client)
        loop = asyncio.get_running_loop()
        running = loop.run_in_executor(self._executor, lambda: function(*args, **kwargs))

        def finish(done: asyncio.Future[R]) -> None:
            self._turns.release(client, worker)
            if not done.cancelled():
                done.exception()  # retrieved, even if nobody waits for it any more

        # a thread cannot be cancelled: the client keeps its worker until it has finished
        running.add_done_callback(finish)
        return await asyncio.shield(running)

    def close(self) -> None:
        """End the threads."""
        self._executor.shutdown(wait=False, cancel_futures=True)
