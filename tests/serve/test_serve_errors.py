"""The status and the shape of each error over HTTP."""

from __future__ import annotations

import json

import pytest

from qtool.errors import BackendFailed, CheckpointRefused, QtoolError, ResourceError, UsageError
from qtool.sandbox import TooManyWaiting
from qtool.serve.http.errors import STATUSES, Refused, error_detail, http_error_detail, status_of
from qtool.serve.service import Busy, ModelNotFound


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
