"""uvicorn's HTTP connection with the limits that only the parser of bytes can keep."""

from __future__ import annotations

import asyncio
import math
from asyncio import Transport
from collections import Counter
from functools import partial
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from qtool.serve.http.errors import Refused
from qtool.serve.http.limits import RequestLimits
from qtool.serve.settings import CLIENT_SHARE, RETRY_AFTER_S
from qtool.serve.turns import client_at

MIN_READ_BYTES = 64 << 10  # that a client reads in `RequestLimits.stall_s`, if it is sent so many


class Connection(HttpToolsProtocol):
    """uvicorn's connection, with deadlines for the head of a request and for a client that does not
    read, and limits on their size.

    The event loop and httptools call the public methods; each does its part and calls its parent's.
    """

    def __init__(self, *, limits: RequestLimits, peers: Peers, **options: Any) -> None:
        super().__init__(**options)
        self._limits = limits
        self._peers = peers
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._in_head = True
        self._is_used = False  # a request came
        self._is_last = False  # the server ends
        self._head_bytes = 0
        self._framing_bytes = 0

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """Wait for a request. If there are too many connections, close an idle one for this one, or
        else refuse this one.
        """
        super().connection_made(transport)
        if self._peers.add(self, client_at((self.client or ("",))[0])):
            self._expect_head()
        else:
            self._end(Refused("too_many_connections", "the server has too many connections"))

    def give_way(self) -> None:
        """Close this idle connection in favour of a new one."""
        if self._is_used and not self._head_bytes:
            self.transport.close()  # as after `KEEP_ALIVE_S`
        else:
            self._end(Refused("too_many_connections", "the server has too many connections"))

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers."""
        self._peers.remove(self)
        self._stop_head_timer()
        self._stop_stall_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse bytes, within the limits for a head and for what surrounds a body."""
        if self._in_head:
            self._head_bytes += len(data)
        else:
            self._framing_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._in_head and self._head_bytes > self._limits.head_bytes:
            self._end(
                Refused(
                    "headers_too_large",
                    f"the head of the request is larger than {self._limits.head_bytes >> 10} kB",
                )
            )
        elif self._framing_bytes > self._limits.framing_bytes:
            self._end(
                Refused(
                    "bad_request",
                    "the body is sent in too many small chunks, or with trailers",
                )
            )
        elif self._in_head and self._head_timer is None and not self._is_answering():
            self._expect_head()

    def on_headers_complete(self) -> None:
        """Stop waiting for the head."""
        self._peers.set_idle(self, False)
        self._in_head = False
        self._head_bytes = 0
        self._framing_bytes = 0
        self._stop_head_timer()
        super().on_headers_complete()
        self._is_used = True
        if self._is_last:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        """Count a part of the body as no framing."""
        self._framing_bytes -= len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Expect a head next."""
        super().on_message_complete()
        self._in_head = True
        self._framing_bytes = 0

    def on_response_complete(self) -> None:
        """Watch the client of a closing connection: it may never read the last bytes."""
        super().on_response_complete()
        if self._in_head and not self._is_answering():  # no pipelined request
            self._peers.set_idle(self, True)
        self._watch_reader_if_closing()

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection."""
        super().timeout_keep_alive_handler()
        self._watch_reader_if_closing()

    def shutdown(self) -> None:
        """Close the connection after its response; a new one first gets a moment, so that a
        request that is under way learns why.
        """
        self._is_last = True
        if self._is_used:
            super().shutdown()
        else:
            self.loop.call_later(self._limits.linger_s, super().shutdown)

    def pause_writing(self) -> None:
        """Give a client that is behind some time to read."""
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        """Stop the time of a client that has caught up."""
        self._stop_stall_timer()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Answer invalid HTTP in the shape of every other error."""
        self._end(Refused("bad_request", msg))

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(self._limits.head_s, self._on_head_timeout)

    def _on_head_timeout(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            self._end(
                Refused("header_timeout", f"no complete request after {self._limits.head_s:g} s")
            )

    def _end(self, error: Refused) -> None:
        """Close the connection, with an error unless a response is under way."""
        if not self._is_answering() or not self.cycle.response_started:
            data = error.to_json("" if self._in_head else self.scope["path"])
            retry = f"retry-after: {RETRY_AFTER_S}\r\n" if error.status == 503 else ""
            head = (
                f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\n"
                "content-type: application/json\r\n"
                f"content-length: {len(data)}\r\n{retry}connection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + data)
        self.transport.close()
        self._watch_reader_if_closing()

    def _watch_reader_if_closing(self) -> None:
        if self.transport.is_closing() and self._stall_timer is None:
            self._watch_reader()

    def _watch_reader(self) -> None:
        self._stop_stall_timer()
        self._stall_timer = self.loop.call_later(
            self._limits.stall_s, self._check_reader, self.transport.get_write_buffer_size()
        )

    def _check_reader(self, before: int) -> None:
        left = self.transport.get_write_buffer_size()
        if left and before - left < MIN_READ_BYTES:
            self.transport.abort()
        elif left:
            self._watch_reader()

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None


class Peers:
    """The open connections of each client, and which of them are idle.

    When a client, or all of them, have too many connections, a new one takes the place of the one
    that has been idle longest.
    """

    def __init__(self, limits: RequestLimits) -> None:
        self._most = limits.connections
        self._most_each = math.ceil(limits.connections * CLIENT_SHARE)
        self._clients: dict[Connection, str] = {}
        self._counts: Counter[str] = Counter()
        self._idle: dict[Connection, None] = {}
        """The one that has been idle longest stands first."""

    def add(self, connection: Connection, client: str) -> bool:
        """Count ``connection`` of ``client``, and return whether there was room for it."""
        has_room = True
        if self._counts[client] >= self._most_each:
            has_room = self._make_room(client)
        elif len(self._clients) >= self._most:
            has_room = self._make_room(None)
        self._clients[connection] = client
        self._counts[client] += 1
        self.set_idle(connection, has_room)
        return has_room

    def remove(self, connection: Connection) -> None:
        """Forget ``connection``, if it is known."""
        self._idle.pop(connection, None)
        client = self._clients.pop(connection, None)
        if client is not None:
            self._counts[client] -= 1
            if not self._counts[client]:
                del self._counts[client]

    def set_idle(self, connection: Connection, idle: bool) -> None:
        """Note whether ``connection`` waits for a request."""
        self._idle.pop(connection, None)
        if idle and connection in self._clients:
            self._idle[connection] = None

    def _make_room(self, client: str | None) -> bool:
        """Close the connection that has been idle longest, of ``client`` if there is one; return
        whether there was one.
        """
        for connection in self._idle:
            if client in (None, self._clients[connection]):
                self.remove(connection)
                connection.give_way()
                return True
        return False


def limited_connection(limits: RequestLimits) -> partial[Connection]:
    """Return the factory of connections for uvicorn."""
    return partial(Connection, limits=limits, peers=Peers(limits))
