"""The limits of requests, and the middleware that checks the API key and the body of each.

Bodies are read whole before a route sees them, within limits and a deadline. `connection` watches
headers, slow readers and the number of connections, where uvicorn parses bytes.
"""

from __future__ import annotations

import asyncio
import hmac
from collections import Counter
from dataclasses import dataclass
from ipaddress import ip_address
from typing import cast
from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qtool.sandbox import TooManyWaiting
from qtool.serve.host import ServiceHost
from qtool.serve.http.errors import Refused, error_detail, note_refusal
from qtool.serve.http.json_body import outside_strings
from qtool.serve.settings import CLIENT_SHARE, RETRY_AFTER_S
from qtool.serve.turns import Origin, client_at, set_origin

REQUEST_ID_HEADERS = ("x-request-id", "request-id")  # OpenAI's, and Anthropic's
OPEN_PATHS = frozenset({"/", "/health", "/metrics", "/version"})  # without a key


@dataclass(frozen=True)
class RequestLimits:
    """What one client may cost."""

    body_bytes: int = 8 << 20
    """Of one request."""

    held_bytes: int = 256 << 20
    """Of the bodies of all requests that are not answered yet."""

    head_bytes: int = 64 << 10
    """Of one request: its first line and headers."""

    framing_bytes: int = 1 << 20
    """Sent around the chunks of one body, and as trailers."""

    values: int = 1 << 16
    """Objects, arrays and members of objects in one body."""

    items: int = 1 << 20
    """Of all arrays and objects in one body; lists of tokens are long."""

    head_s: float = 10.0
    """Seconds until the headers are complete."""

    body_s: float = 60.0
    """Seconds until the body is complete."""

    stall_s: float = 30.0
    """Seconds for a client that does not read its response."""

    linger_s: float = 2.0
    """Seconds for a client that still sends, so that it can read why it was refused."""

    connections: int = 8192
    """At a time."""


class LimitsMiddleware:
    """ASGI middleware that checks the API key and the host, reads the body, and answers the
    requests that it refuses.
    """

    def __init__(self, app: ASGIApp, host: ServiceHost, limits: RequestLimits) -> None:
        self._app = app
        self._host = host
        self._threads = host.threads
        self._settings = settings = host.settings
        self._limits = limits
        self._key = settings.api_key.encode() if settings.api_key else None
        self._held_bytes: Counter[str] = Counter()
        """By client."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request that is complete and allowed."""
        assert scope["type"] == "http"
        headers = dict(scope["headers"])
        client = client_at((scope["client"] or ("",))[0])
        origin = Origin(client)
        set_origin(origin)
        if scope["method"] == "HEAD":  # uvicorn leaves out the body
            scope = {**scope, "method": "GET"}
        chunks: list[bytes] = []
        complete = False
        answering = False

        async def answer(message: Message) -> None:
            nonlocal answering
            answering = True
            if message["type"] == "http.response.start":
                answer_headers = MutableHeaders(scope=message)
                for name in REQUEST_ID_HEADERS:
                    answer_headers[name] = origin.request_id
            await send(message)

        try:
            self._check_client(scope, headers)
            if not await self._read(headers, receive, client, chunks):
                return
            complete = True
            body = b"".join(chunks)
            origin.body_bytes = len(body)
            await self._check_body(scope["method"], headers, body)
            given = [cast(Message, {"type": "http.request", "body": body, "more_body": False})]

            async def replay() -> Message:
                return given.pop() if given else await receive()

            await self._app(scope, replay, answer)
        except TooManyWaiting:
            await self._refuse(
                Refused("busy", "too many bodies wait to be read"), scope, None, answer
            )
        except Refused as error:
            self._release(client, chunks)
            await self._refuse(error, scope, None if complete else receive, answer)
        except asyncio.CancelledError:  # the time to drain is over
            if not answering:
                await self._refuse(Refused("draining", "the server is ending"), scope, None, answer)
        finally:
            self._release(client, chunks)

    def _release(self, client: str, chunks: list[bytes]) -> None:
        self._held_bytes[client] -= sum(map(len, chunks))
        if not self._held_bytes[client]:
            del self._held_bytes[client]
        chunks.clear()

    def _check_client(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        if sum(name == b"host" for name, _ in scope["headers"]) > 1:
            raise Refused("bad_request", "the request has several Host headers")
        if self._key is not None:
            if scope["path"] in OPEN_PATHS or _has_key(headers, self._key):
                return
            raise Refused(
                "invalid_api_key",
                "the API key is missing or wrong; send `Authorization: Bearer KEY` or "
                "`x-api-key: KEY`",
            )
        host = headers.get(b"host", b"")
        if self._settings.is_local and not _names_this_machine(host, self._settings.host):
            # DNS rebinding: a browser takes a page whose name leads here for one of this server's
            raise Refused(
                "host_not_allowed",
                "without --api-key a server on this machine answers to localhost and to "
                "addresses, not to other names",
            )

    async def _read(
        self, headers: dict[bytes, bytes], receive: Receive, client: str, chunks: list[bytes]
    ) -> bool:
        """Put the body into ``chunks``; return False if the client left before it was complete.

        Raises: Refused.
        """
        limits = self._limits
        too_large = Refused(
            "body_too_large", f"the body is larger than {limits.body_bytes >> 20} MB"
        )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > limits.body_bytes:
            raise too_large
        size = 0
        try:
            async with asyncio.timeout(limits.body_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return False
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    self._held_bytes[client] += len(chunks[-1])
                    if size > limits.body_bytes:
                        raise too_large
                    if (
                        self._held_bytes[client] > limits.held_bytes * CLIENT_SHARE
                        or self._held_bytes.total() > limits.held_bytes
                    ):
                        raise Refused(
                            "busy", "the server holds as many bytes of requests as it can"
                        )
                    if not message.get("more_body", False):
                        return True
        except TimeoutError:
            raise Refused(
                "body_timeout", f"the body was not complete after {limits.body_s:g} s"
            ) from None

    async def _check_body(self, method: str, headers: dict[bytes, bytes], body: bytes) -> None:
        if method != "POST" or not body:
            return
        if headers.get(b"content-encoding", b"identity").strip().lower() != b"identity":
            raise Refused("unsupported_encoding", "the body is compressed; send it as it is")
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if kind != b"application/json":
            raise Refused(
                "unsupported_media_type",
                "send JSON, with the header `Content-Type: application/json`",
            )
        if len(body) > self._limits.values and await self._threads.run(
            len(body), _is_crowded, body, self._limits
        ):
            raise Refused(
                "too_many_values",
                f"the body has more than {self._limits.values:,} objects, arrays and members, or "
                "more items",
            )

    async def _refuse(
        self, error: Refused, scope: Scope, receive: Receive | None, send: Send
    ) -> None:
        """Answer at once; then ``receive`` a little more of what is still being sent, because a
        connection that is reset loses the answer.
        """
        note_refusal(self._host.metrics, scope, error.status, error_detail(error))
        data = error.to_json(scope["path"])
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
            async with asyncio.timeout(self._limits.linger_s):
                while receive and _has_more(await receive()):
                    pass
        except TimeoutError:
            pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _has_key(headers: dict[bytes, bytes], key: bytes) -> bool:
    """Whether one of the headers is ``key``: OpenAI's, or Anthropic's."""
    scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
    is_bearer = scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), key)
    return is_bearer or hmac.compare_digest(headers.get(b"x-api-key", b"").strip(), key)


def _has_more(message: Message) -> bool:
    return message["type"] == "http.request" and bool(message.get("more_body", False))


def _names_this_machine(host: bytes, own: str) -> bool:
    """Whether a Host header names the server by an address, as localhost, or as ``own``, its
    --host; a missing header does.
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


def _is_crowded(body: bytes, limits: RequestLimits) -> bool:
    """Whether a body, if it is JSON, has too many values to validate; they are counted without
    parsing it, in some hundredths of a second.
    """
    if body.count(b'"') - body.count(b'\\"') > 4 * limits.values:
        return True
    outside = outside_strings(body)
    return (
        outside.count(b"[") + outside.count(b"{") + outside.count(b":") > limits.values
        or outside.count(b",") > limits.items
    )
