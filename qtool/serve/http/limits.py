"""What stands between the network and the routes: bounds in bytes and seconds for whoever sends and
reads, the key, and errors in OpenAI's shape.

Bodies are read whole before a route sees them, within limits and a deadline. Headers, readers that
take nothing and the number of connections are watched where uvicorn parses bytes.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from asyncio import Transport
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_address
from typing import Any, cast
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from qtool.serve.settings import RETRY_AFTER_S, ServeSettings

OPEN_PATHS = frozenset({"/", "/health", "/metrics", "/version"})  # without a key
LEAST_TAKEN = 64 << 10  # bytes that a reader takes in `Bounds.stall_s`, or all there is for it
REASONS = {
    400: "Bad Request",
    408: "Request Timeout",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
}
TYPES = {401: "authentication_error", 403: "permission_error", 503: "service_unavailable_error"}


@dataclass(frozen=True)
class Bounds:
    """What one client may cost.

    Args:
        body_bytes, head_bytes: of one request. held_bytes: of all bodies together, until their
            requests are answered.
        framing_bytes: of what is sent with a body in chunks besides the body.
        values: objects, arrays and members of objects in one body. items: of all its arrays and
            objects; lists of tokens are long.
        head_s, body_s: seconds until they are complete. stall_s: for a reader that takes nothing.
            linger_s: for who still sends to read a refusal.
        connections: at a time.
    """

    body_bytes: int = 8 << 20
    held_bytes: int = 256 << 20
    head_bytes: int = 64 << 10
    framing_bytes: int = 1 << 20
    values: int = 1 << 16
    items: int = 1 << 20
    head_s: float = 10.0
    body_s: float = 60.0
    stall_s: float = 30.0
    linger_s: float = 2.0
    connections: int = 8192


class Refused(Exception):
    """A request that no route should see."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class Guard:
    """An ASGI application around another: checks who asks, reads the body, answers what it
    refuses.
    """

    def __init__(self, app: ASGIApp, settings: ServeSettings, bounds: Bounds) -> None:
        self._app, self._settings, self._bounds = app, settings, bounds
        self._key = settings.api_key.encode() if settings.api_key else None
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on that is complete and allowed."""
        assert scope["type"] == "http"
        headers = dict(scope["headers"])
        chunks: list[bytes] = []
        complete = answering = False

        async def answer(message: Message) -> None:
            nonlocal answering
            answering = True
            await send(message)

        try:
            self._check_client(scope["path"], headers)
            if not await self._read(headers, receive, chunks):
                return
            complete = True
            body = b"".join(chunks)
            self._check_body(scope["method"], headers, body)
            given = [cast(Message, {"type": "http.request", "body": body, "more_body": False})]

            async def replay() -> Message:
                return given.pop() if given else await receive()

            await self._app(scope, replay, answer)
        except Refused as error:
            self._release(chunks)
            await self._refuse(error, None if complete else receive, send)
        except asyncio.CancelledError:  # the server's end waits no longer
            if not answering:
                await self._refuse(Refused(503, "draining", "the server is ending"), None, send)
        finally:
            self._release(chunks)

    def _release(self, chunks: list[bytes]) -> None:
        self._held -= sum(map(len, chunks))
        chunks.clear()

    def _check_client(self, path: str, headers: dict[bytes, bytes]) -> None:
        if (
            self._key is not None
            and path not in OPEN_PATHS
            and not self._has_key(headers.get(b"authorization", b""))
        ):
            raise Refused(
                401,
                "invalid_api_key",
                "the API key is missing or wrong; send `Authorization: Bearer KEY`",
            )
        if (
            self._key is None
            and self._settings.is_local
            and not _names_this_machine(headers.get(b"host", b""), self._settings.host)
        ):
            # a page whose name was made to lead here would be this server's own origin for its
            # browser
            message = (
                "without --api-key a server on this machine answers to localhost and to "
                "addresses, not to other names"
            )
            raise Refused(403, "host_not_allowed", message)

    def _has_key(self, value: bytes) -> bool:
        scheme, _, key = value.partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(
            key.strip(), cast(bytes, self._key)
        )

    async def _read(
        self, headers: dict[bytes, bytes], receive: Receive, chunks: list[bytes]
    ) -> bool:
        """Put the body into ``chunks``; return False when the client left before it was complete.

        Raises: Refused.
        """
        bounds = self._bounds
        too_large = Refused(
            413, "body_too_large", f"the body is larger than {bounds.body_bytes >> 20} MB"
        )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > bounds.body_bytes:
            raise too_large
        size = 0
        try:
            async with asyncio.timeout(bounds.body_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return False
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    self._held += len(chunks[-1])
                    if size > bounds.body_bytes:
                        raise too_large
                    if self._held > bounds.held_bytes:
                        raise Refused(
                            503, "busy", "the server holds as many bytes of requests as it may"
                        )
                    if not message.get("more_body", False):
                        return True
        except TimeoutError:
            raise Refused(
                408, "body_timeout", f"the body was not complete after {bounds.body_s:g} s"
            ) from None

    def _check_body(self, method: str, headers: dict[bytes, bytes], body: bytes) -> None:
        if method != "POST" or not body:
            return
        if headers.get(b"content-encoding", b"identity").strip().lower() != b"identity":
            raise Refused(415, "unsupported_encoding", "the body is compressed; send it as it is")
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if kind != b"application/json":
            raise Refused(
                415,
                "unsupported_media_type",
                "send JSON, with the header `Content-Type: application/json`",
            )
        if len(body) > self._bounds.values and _is_crowded(body, self._bounds):
            raise Refused(
                400,
                "too_many_values",
                f"the body has more than {self._bounds.values:,} objects, arrays and members, or "
                "more items",
            )

    async def _refuse(self, error: Refused, receive: Receive | None, send: Send) -> None:
        """Answer at once; then ``receive`` a little more of what is still being sent, for a
        connection that is reset loses the answer.
        """
        data = refusal_body(error)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(data)).encode()),
            (b"connection", b"close"),
        ]
        if error.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        if error.status == 503:
            headers.append((b"retry-after", str(RETRY_AFTER_S).encode()))
        await send({"type": "http.response.start", "status": error.status, "headers": headers})
        await send({"type": "http.response.body", "body": data, "more_body": True})
        try:
            async with asyncio.timeout(self._bounds.linger_s):
                while (
                    receive
                    and (message := await receive())["type"] == "http.request"
                    and message.get("more_body", False)
                ):
                    pass
        except TimeoutError:
            pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _names_this_machine(host: bytes, own: str) -> bool:
    """Whether a Host header names the server by an address, as localhost, or as it was told to
    listen; one that is missing does.
    """
    try:
        name = urlsplit(f"//{host.decode('ascii')}").hostname or "localhost"
        return (
            name in ("localhost", own.lower())
            or name.endswith(".localhost")
            or bool(ip_address(name))
        )
    except ValueError:
        return False


def _is_crowded(body: bytes, bounds: Bounds) -> bool:
    """Whether a body, if it is JSON, has too many values to look at each: counted without reading
    it, in some hundredths of a second.
    """
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    if plain.count(b'"') > 4 * bounds.values:
        return True
    outside = b"".join(plain.split(b'"')[::2])  # of strings
    return (
        outside.count(b"[") + outside.count(b"{") + outside.count(b":") > bounds.values
        or outside.count(b",") > bounds.items
    )


def refusal_body(error: Refused) -> bytes:
    """Return an error in OpenAI's shape."""
    kind = TYPES.get(error.status, "invalid_request_error")
    return json.dumps(
        {"error": {"message": error.message, "type": kind, "param": None, "code": error.code}}
    ).encode()


class Connection(HttpToolsProtocol):
    """uvicorn's connection, with deadlines for the head of a request and for a reader that takes
    nothing, and bounds on both.

    ``HttpToolsProtocol`` is given its callbacks by the event loop and by httptools; each one here
    does its own part and hands on.
    """

    def __init__(self, *, bounds: Bounds, **options: Any) -> None:
        super().__init__(**options)
        self._bounds = bounds
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._in_head = True
        self._is_used = self._is_last = False  # a request came; the server ends
        self._head_bytes = self._framing_bytes = 0

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request; send away what is one connection too many."""
        super().connection_made(transport)
        if len(self.connections) > self._bounds.connections:
            self._end(Refused(503, "too_many_connections", "the server has too many connections"))
        else:
            self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timers."""
        self._cancel("_head_timer")
        self._cancel("_stall_timer")
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes: no more of a head than the limit, and no more around a body."""
        if self._in_head:
            self._head_bytes += len(data)
        else:
            self._framing_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._in_head and self._head_bytes > self._bounds.head_bytes:
            self._end(
                Refused(
                    431,
                    "headers_too_large",
                    f"the head of the request is larger than {self._bounds.head_bytes >> 10} kB",
                )
            )
        elif self._framing_bytes > self._bounds.framing_bytes:
            self._end(
                Refused(
                    400,
                    "bad_request",
                    "the body is sent in too many small chunks, or with trailers",
                )
            )
        elif self._in_head and self._head_timer is None and not self._is_answering():
            self._expect_head()

    def on_headers_complete(self) -> None:
        """The head is there."""
        self._in_head, self._head_bytes, self._framing_bytes = False, 0, 0
        self._cancel("_head_timer")
        super().on_headers_complete()
        self._is_used = True
        if self._is_last:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        """A part of the body came."""
        self._framing_bytes -= len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """What follows is a head again."""
        super().on_message_complete()
        self._in_head, self._framing_bytes = True, 0

    def on_response_complete(self) -> None:
        """A connection that is closed now may have bytes for a reader that takes none."""
        super().on_response_complete()
        self._watch_reader_if_closing()

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection that nothing came on."""
        super().timeout_keep_alive_handler()
        self._watch_reader_if_closing()

    def shutdown(self) -> None:
        """Close the connection after its answer; one that is new has a moment for its request,
        which may be under way, to be told the same.
        """
        self._is_last = True
        if self._is_used:
            super().shutdown()
        else:
            self.loop.call_later(self._bounds.linger_s, super().shutdown)

    def pause_writing(self) -> None:
        """The reader is behind: it gets some time."""
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        """The reader has caught up."""
        self._cancel("_stall_timer")
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP as every other error is answered."""
        self._end(Refused(400, "bad_request", msg))

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(self._bounds.head_s, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            self._end(
                Refused(
                    408, "header_timeout", f"no complete request after {self._bounds.head_s:g} s"
                )
            )

    def _end(self, error: Refused) -> None:
        """Close the connection, with an answer unless there is one under way."""
        if not self._is_answering() or not self.cycle.response_started:
            data = refusal_body(error)
            retry = f"retry-after: {RETRY_AFTER_S}\r\n" if error.status == 503 else ""
            head = (
                "content-type: application/json\r\ncontent-length: "
                f"{len(data)}\r\n{retry}connection: close\r\n\r\n"
            )
            self.transport.write(
                f"HTTP/1.1 {error.status} {REASONS[error.status]}\r\n{head}".encode() + data
            )
        self.transport.close()
        self._watch_reader_if_closing()

    def _watch_reader_if_closing(self) -> None:
        if self.transport.is_closing() and self._stall_timer is None:
            self._watch_reader()

    def _watch_reader(self) -> None:
        self._cancel("_stall_timer")
        self._stall_timer = self.loop.call_later(
            self._bounds.stall_s, self._reader_is_late, self.transport.get_write_buffer_size()
        )

    def _reader_is_late(self, before: int) -> None:
        left = self.transport.get_write_buffer_size()
        if left and before - left < LEAST_TAKEN:
            self.transport.abort()
        elif left:
            self._watch_reader()

    def _cancel(self, name: str) -> None:
        timer: Any = getattr(self, name)
        if timer is not None:
            timer.cancel()
            setattr(self, name, None)


def bounded_connection(bounds: Bounds) -> partial[Connection]:
    """Return what uvicorn makes its connections with."""
    return partial(Connection, bounds=bounds)
