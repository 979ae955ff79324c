"""The status and the shape of each error over HTTP."""

from __future__ import annotations

import asyncio
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import pytest
from support import EXAMPLE

from qtool.errors import BackendFailed, CheckpointRefused, QtoolError, ResourceError, UsageError
from qtool.sandbox import TooManyWaiting
from qtool.serve.host import ServiceHost
from qtool.serve.http.app import make_app
from qtool.serve.http.errors import STATUSES, Refused, error_detail, http_error_detail, status_of
from qtool.serve.service import Busy, ModelNotFound
from qtool.serve.settings import ServeSettings


@pytest.mark.parametrize(
    "error, status, type, code",
    [
        (UsageError("E_PROMPT", "no"), 400, "invalid_request_error", "prompt"),
        (UsageError("E_TOO_LONG", "no"), 400, "invalid_request_error", "context_length_exceeded"),
        (CheckpointRefused("E_X", "no"), 400, "invalid_request_error", "x"),
        (Refused("invalid_api_key", "no"), 401, "authentication_error", "invalid_api_key"),
        (Refused("host_not_allowed", "no"), 403, "permission_error", "host_not_allowed"),
        (ModelNotFound("no"), 404, "invalid_request_error", "model_not_found"),
        (Refused("body_timeout", "no"), 408, "invalid_request_error", "body_timeout"),
        (Refused("headers_too_large", "no"), 431, "invalid_request_error", "headers_too_large"),
        (Busy("queue_full", "no"), 429, "rate_limit_error", "queue_full"),
        (TooManyWaiting("no"), 429, "rate_limit_error", "queue_full"),
        (QtoolError("E_BUG", "no"), 500, "server_error", "bug"),
        (BackendFailed("E_BACKEND", "no"), 500, "server_error", "backend"),
        (KeyError("no"), 500, "server_error", "bug"),
        (Busy("loading", "no"), 503, "service_unavailable_error", "loading"),
        (Busy("draining", "no"), 503, "service_unavailable_error", "draining"),
        (ResourceError("E_DRAINING", "no"), 503, "service_unavailable_error", "draining"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_each_error_has_its_status_and_openais_type(error, status, type, code):
    detail = error_detail(error)
    assert (status_of(error), detail.type, detail.code) == (status, type, code)


def test_a_hint_is_part_of_the_message():
    detail = error_detail(UsageError("E_PROMPT", "it is empty", hint="send a token"))
    assert detail.message == "it is empty; send a token"


def test_a_refusal_is_sent_in_openais_shape():
    refused = Refused("body_too_large", "too large")
    assert json.loads(refused.to_json()) == {
        "error": {
            "message": "too large",
            "type": "invalid_request_error",
            "param": None,
            "code": "body_too_large",
        }
    }


@pytest.mark.parametrize(
    "code, type",
    [
        ("invalid_api_key", "authentication_error"),
        ("body_too_large", "request_too_large"),
        ("queue_full", "rate_limit_error"),
        ("loading", "overloaded_error"),
        ("bad_request", "invalid_request_error"),
    ],
)
def test_anthropics_routes_have_anthropics_shape(code, type):
    for path in ("/v1/messages", "/v1/messages/count_tokens", "/v1/messages/nowhere"):
        reply = json.loads(Refused(code, "no").to_json(path))
        assert reply == {"type": "error", "error": {"type": type, "message": "no"}}
    assert "code" in json.loads(Refused(code, "no").to_json("/v1/messages2"))["error"]


def test_every_status_is_one_of_an_error():
    assert all(400 <= status < 600 for status in STATUSES.values())


@pytest.mark.parametrize(
    "status, type, code",
    [
        (400, "invalid_request_error", "invalid_json"),
        (404, "invalid_request_error", "not_found"),
        (405, "invalid_request_error", "method_not_allowed"),
        (500, "server_error", None),
    ],
)
def test_an_http_error_keeps_its_status(status, type, code):
    detail = http_error_detail(status, "no")
    assert (detail.type, detail.code) == (type, code)


class OneModel(BaseHTTPRequestHandler):
    """A server that knows no other model than ``name``."""

    name = "first"

    def do_GET(self):
        self.answer(200, {"data": [{"id": self.name}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.answer(200 if body["model"] == self.name else 404, {"served": self.name})

    def answer(self, status, value):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def test_a_reference_that_comes_back_with_another_model_is_asked_for_that():
    with HTTPServer(("127.0.0.1", 0), OneModel) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        host = ServiceHost(ServeSettings(model_path=str(EXAMPLE), reference=url))
        transport = httpx.ASGITransport(make_app(host))

        async def ask() -> list[dict]:
            async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
                answers = []
                for OneModel.name in ("first", "first", "second", "second"):
                    path = "/reference/v1/completions"
                    answer = await client.post(path, json={"model": "m", "prompt": "x"})
                    answers.append((answer.status_code, answer.json()["served"]))
                return answers

        found = asyncio.run(ask())
        server.shutdown()
        host.threads.close()
    assert found == [(200, "first"), (200, "first"), (200, "second"), (200, "second")]
