"""Passes the page's requests on to a second server, so that two answers can be compared.

The browser asks this server alone: the page's policy allows no other, and a second server need not
allow it either.
"""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus

import httpx
import msgspec
from fastapi import FastAPI, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from qtool.errors import UsageError
from qtool.serve.host import ServiceHost
from qtool.serve.http.json_body import parse_json
from qtool.serve.service import Busy

PATHS = ("v1/chat/completions", "v1/completions")
MAX_REQUESTS = 16  # at a time
CONNECT_S = 10.0
SILENT_S = 300.0
KEPT_HEADERS = ("content-type", "retry-after")


def add_reference_routes(app: FastAPI, host: ServiceHost) -> None:
    """Add a route for each of `PATHS` below ``/reference/``, where --reference names a server."""
    if host.settings.reference is None:
        return
    reference = _Reference(host.settings.reference)

    def add(path: str) -> None:
        @app.post(f"/reference/{path}", include_in_schema=False)
        async def forward(request: Request) -> Response:
            # as it came: a route without a model of its body reads none
            body = await Request(request.scope, request.receive).body()
            return await reference.forward(
                path, await host.threads.run(len(body), parse_json, body)
            )

    for path in PATHS:
        add(path)


class _Reference:
    """The second server, an OpenAI-compatible one."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        self._client: httpx.AsyncClient | None = None
        """Made on first use, in the event loop."""
        self._model: str | None = None
        self._running = 0

    async def forward(self, path: str, fields: object) -> Response:
        """Send ``fields`` to ``path`` there, under its model's name, and return its response.

        Raises: Busy, when there are too many, or nobody answers; UsageError.
        """
        if self._running >= MAX_REQUESTS:
            raise Busy("busy", "too many requests wait for the reference server")
        if not isinstance(fields, dict):
            raise UsageError("E_BODY", "the body is not a JSON object")
        self._running += 1
        try:
            response = await self._send(path, fields)
        except (httpx.HTTPError, msgspec.MsgspecError, IndexError) as error:
            self._release()
            self._model = None  # it may come back with another one
            reason = type(error).__name__
            message = f"the reference server does not answer as one: {reason}"
            raise Busy("reference_failed", message) from error
        except BaseException:
            self._release()
            raise
        return _Forwarded(response, self._release)

    def _release(self) -> None:
        self._running -= 1

    async def _send(self, path: str, fields: dict[str, object]) -> httpx.Response:
        if self._client is None:
            timeout = httpx.Timeout(CONNECT_S, read=SILENT_S)
            self._client = httpx.AsyncClient(timeout=timeout)
        known = self._model
        response = await self._send_to(self._client, path, fields, known)
        if response.status_code == HTTPStatus.NOT_FOUND and known is not None:
            # restarted, with another model
            await response.aclose()
            response = await self._send_to(self._client, path, fields, None)
        return response

    async def _send_to(
        self, client: httpx.AsyncClient, path: str, fields: dict[str, object], model: str | None
    ) -> httpx.Response:
        """Send a request for ``model``; None: for the one that is served there."""
        if model is None:
            listed = await client.get(f"{self._url}/v1/models")
            listed.raise_for_status()
            model = msgspec.json.decode(listed.content, type=_Models).data[0].id
            self._model = model
        request = client.build_request(
            "POST", f"{self._url}/{path}", json={**fields, "model": model}
        )
        return await client.send(request, stream=True)


class _Forwarded(StreamingResponse):
    """The response of the second server, as it comes."""

    def __init__(self, response: httpx.Response, release: Callable[[], None]) -> None:
        kept = {name: response.headers[name] for name in KEPT_HEADERS if name in response.headers}
        super().__init__(response.aiter_bytes(), status_code=response.status_code, headers=kept)
        self._response = response
        self._release = release

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it until it ends or the client is gone."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._release()
            await self._response.aclose()


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]
