"""`SandboxPool`: several child processes for one function, which clients share by `Turns`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence

import msgspec

from qtool.sandbox import CallRaised, Sandbox, SandboxError
from qtool.serve.turns import Turns, current_origin

CHILDREN = 2
MAX_WAITING = 4096
GRACE_S = 1.0  # to end by itself, for a call without a waiter: a new child costs more than most


class SandboxPool:
    """Calls one function in several `Sandbox`es, each with one call at a time.

    A call that is cancelled while it runs is ended with its child. The client keeps its worker
    until that child is replaced, so that the next client does not wait for the replacement.

    Args:
        make_sandbox: returns another sandbox; it starts its child at the first call.
        first_call: arguments of a quick call, which starts a child.
        max_waiting: calls that may wait.
        max_waiting_each: calls of one client that may wait.
    """

    def __init__(
        self,
        make_sandbox: Callable[[], Sandbox],
        first_call: Sequence[object],
        *,
        max_waiting: int = MAX_WAITING,
        max_waiting_each: int = MAX_WAITING // 4,
    ) -> None:
        self._make_sandbox = make_sandbox
        self._first_call = first_call
        self._sandboxes = [make_sandbox() for _ in range(CHILDREN)]
        self._turns = Turns(CHILDREN, max_waiting=max_waiting, max_waiting_each=max_waiting_each)
        self._replacing: set[asyncio.Task[None]] = set()
        self._closed = False

    async def call(self, *args: object) -> object:
        """Return the function's result for ``args``, strict JSON. Raises: as `Sandbox.call`."""
        client = current_origin().client
        worker = await self._turns.acquire(client)
        calling = asyncio.ensure_future(_call(self._sandboxes[worker], args))
        calling.add_done_callback(_see)
        usable = False
        try:
            result = await asyncio.shield(calling)
            usable = True
            return result
        except CallRaised:
            usable = True
            raise
        finally:
            if usable or self._closed:
                self._turns.release(client, worker)
            else:
                task = asyncio.create_task(self._make_usable(client, worker, calling))
                self._replacing.add(task)
                task.add_done_callback(self._replacing.discard)

    async def close(self) -> None:
        """End the children; running calls raise ChildDied."""
        self._closed = True
        for task in self._replacing:
            task.cancel()
        await asyncio.gather(*self._replacing, return_exceptions=True)
        for sandbox in self._sandboxes:
            await sandbox.close()

    async def _make_usable(self, client: str, worker: int, calling: asyncio.Future[object]) -> None:
        """End ``calling``, if it still runs after a moment, and wait for a child that answers."""
        try:
            await asyncio.wait([calling], timeout=GRACE_S)
            if not calling.done():
                calling.cancel()
                old = self._sandboxes[worker]
                self._sandboxes[worker] = self._make_sandbox()
                await old.close()
            with contextlib.suppress(SandboxError):  # the next call gets the reason
                await self._sandboxes[worker].call(*self._first_call)
        finally:
            self._turns.release(client, worker)


def _see(calling: asyncio.Future[object]) -> None:
    """Retrieve the error of a call that nobody waits for, so that asyncio does not log it."""
    if not calling.cancelled():
        calling.exception()


async def _call(sandbox: Sandbox, args: Sequence[object]) -> object:
    try:
        line = msgspec.json.encode(args) + b"\n"  # `json` would hold up the event loop for long
    except (OverflowError, RecursionError):  # integers of any length; nested too deeply
        return await sandbox.call(*args)
    return await sandbox.call_with(line)
