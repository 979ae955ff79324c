"""`Origin`: which client a request is from, and its id. `Turns`: how clients share scarce workers.

A client is an address, for IPv6 the network of a site. The server has one API key, so keys do not
tell clients apart.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter, deque
from contextvars import ContextVar
from dataclasses import dataclass, field
from ipaddress import IPv6Address, ip_address

from qtool.sandbox import TooManyWaiting

IPV6_SITE_BITS = 64  # of an address, for hosts within one site


@dataclass
class Origin:
    """The client of a request, the size of its body, and its id."""

    client: str = ""
    """Empty for the server itself."""

    body_bytes: int = 0

    request_id: str = field(default_factory=lambda: f"req-{uuid.uuid4().hex}")
    """In the headers of the answer and in the log."""


_current: ContextVar[Origin | None] = ContextVar("current_origin", default=None)


def current_origin() -> Origin:
    """Return the origin of the request that the current task answers."""
    return _current.get() or Origin()


def set_origin(origin: Origin) -> None:
    """Let the current task, and those that it starts, answer the request from ``origin``."""
    _current.set(origin)


def name_request(request_id: str) -> str:
    """Give the request that the current task answers this id, and return it."""
    current_origin().request_id = request_id
    return request_id


def client_at(host: str) -> str:
    """Return the name of the client at the address ``host``."""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:  # a Unix socket has none
        return host
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(IPv6Address(int(address) >> IPV6_SITE_BITS << IPV6_SITE_BITS))
    return str(address)


class Turns:
    """Gives workers to calls, one call at a time each, and takes waiting calls from the clients in
    turn.

    If there are several workers, one client never has them all, and never the whole queue.

    Args:
        workers: calls that run at a time.
        max_waiting: calls that may wait.
        max_waiting_each: calls of one client that may wait.
    """

    def __init__(self, workers: int, *, max_waiting: int, max_waiting_each: int) -> None:
        self._free = list(range(workers))
        self._most_each = max(workers - 1, 1)
        self._max_waiting = max_waiting
        self._max_waiting_each = max_waiting_each
        self._running: Counter[str] = Counter()
        self._waiting: dict[str, deque[asyncio.Future[int]]] = {}
        """By client, in the order of their turns."""

    async def acquire(self, client: str) -> int:
        """Return the number of a worker, which the caller must `release`.

        Raises: TooManyWaiting.
        """
        own = len(self._waiting.get(client, ()))
        total = sum(map(len, self._waiting.values()))
        if own >= self._max_waiting_each or total >= self._max_waiting:
            raise TooManyWaiting(f"{own or total} calls are waiting")
        turn: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append(turn)
        self._give_turns()
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.release(client, turn.result())
            else:
                self._forget(client, turn)
            raise

    def release(self, client: str, worker: int) -> None:
        """Give back a worker of ``client``."""
        self._running[client] -= 1
        if not self._running[client]:
            del self._running[client]
        self._free.append(worker)
        self._give_turns()

    def _give_turns(self) -> None:
        while self._free and (client := self._next_client()) is not None:
            turns = self._waiting.pop(client)
            turn = turns.popleft()
            if turns:
                self._waiting[client] = turns  # behind all others
            if turn.done():  # its caller has just been cancelled
                continue
            self._running[client] += 1
            worker = min(self._free)  # workers with higher numbers may not have been started
            self._free.remove(worker)
            turn.set_result(worker)

    def _next_client(self) -> str | None:
        for client in self._waiting:
            if self._running[client] < self._most_each:
                return client
        return None

    def _forget(self, client: str, turn: asyncio.Future[int]) -> None:
        turns = self._waiting.get(client)
        if turns is not None and turn in turns:
            turns.remove(turn)
            if not turns:
                del self._waiting[client]
