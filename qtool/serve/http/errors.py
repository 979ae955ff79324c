"""Errors over HTTP: the one table of their statuses, and OpenAI's shape for them."""

from __future__ import annotations

import json
import logging
import re

from starlette.types import Scope

from qtool.errors import InputRefused, QtoolError, ResourceError, UsageError
from qtool.sandbox import TooManyWaiting
from qtool.serve.api.schemas import ErrorDetail
from qtool.serve.metrics import Metrics
from qtool.serve.service import Busy, ModelNotFound
from qtool.serve.turns import current_origin

LOG = logging.getLogger("qtool.serve")
MAX_LOGGED = 200  # characters of a path
FIELD = re.compile(r"[A-Za-z0-9_.\[\]-]{1,200}")  # others may be text of a client

# An error of the server itself: its code, or else its class -> status
STATUSES: dict[str | type[Exception], int] = {
    "bad_request": 400,
    "too_many_values": 400,
    UsageError: 400,
    InputRefused: 400,
    "invalid_api_key": 401,
    "host_not_allowed": 403,
    ModelNotFound: 404,
    "body_timeout": 408,
    "header_timeout": 408,
    "body_too_large": 413,
    "unsupported_encoding": 415,
    "unsupported_media_type": 415,
    "queue_full": 429,
    TooManyWaiting: 429,
    "headers_too_large": 431,
    Exception: 500,
    "reference_failed": 502,
    "busy": 503,
    "loading": 503,
    "draining": 503,
    "too_many_connections": 503,
    ResourceError: 503,
}
# status -> OpenAI's type of an error; of the others below 500, invalid_request_error
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
# the same in Anthropic's words; of the others below 500, invalid_request_error
ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
ANTHROPIC_PATH = "/v1/messages"  # and what is below it
TOO_LONG = "prompt is too long"  # by which Claude Code knows that it has to compact
HTTP_CODES = {400: "invalid_json", 404: "not_found", 405: "method_not_allowed"}
QTOOL_CODES = {"E_TOO_LONG": "context_length_exceeded"}  # those with a name at OpenAI


class Refused(Exception):
    """A request that no route should see: ``code`` is a key of `STATUSES`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.status = STATUSES[code]

    def to_json(self, path: str = "") -> bytes:
        """Return the error in the shape of the route with that path."""
        return json.dumps(error_body(path, self.status, error_detail(self))).encode()


def status_of(error: Exception) -> int:
    """Return the HTTP status of ``error``."""
    if isinstance(error, Busy | Refused):
        return STATUSES[error.code]
    return next(STATUSES[kind] for kind in type(error).__mro__ if kind in STATUSES)


def error_detail(error: Exception) -> ErrorDetail:
    """Return what the client learns about ``error``."""
    kind = type_of(status_of(error))
    match error:
        case Busy() | Refused():
            return ErrorDetail(message=error.message, type=kind, code=error.code)
        case TooManyWaiting():
            message = f"the server is busy: {error}"
            return ErrorDetail(message=message, type=kind, code="queue_full")
        case ModelNotFound():
            message = str(error.args[0])
            return ErrorDetail(message=message, type=kind, param="model", code="model_not_found")
        case QtoolError():
            message = f"{error.message}; {error.hint}" if error.hint else error.message
            code = QTOOL_CODES.get(error.code, error.code.removeprefix("E_").lower())
            return ErrorDetail(message=message, type=kind, code=code)
    return ErrorDetail(message=f"a bug in qtool: {type(error).__name__}", type=kind, code="bug")


def note_refusal(metrics: Metrics, scope: Scope, status: int, detail: ErrorDetail) -> None:
    """Count a request that is answered with an error, and log a line without its text."""
    code = detail.code or str(status)
    metrics.refused(status, code)
    # whoever waits for the server to load asks once a second
    level = logging.DEBUG if scope["path"] == "/health" else logging.INFO
    LOG.log(
        level,
        "refused: %s %s: %d %s%s, request %s",
        scope["method"],
        scope["path"][:MAX_LOGGED],
        status,
        code,
        f", param {detail.param}" if FIELD.fullmatch(detail.param or "") else "",
        current_origin().request_id,
    )


def http_error_detail(status: int, message: str) -> ErrorDetail:
    """Return the detail of an error that has its status already, such as an unknown path."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return ErrorDetail(message=message, type=kind, code=HTTP_CODES.get(status))


def error_body(path: str, status: int, detail: ErrorDetail) -> dict[str, object]:
    """Return the body of a response with an error, in the shape of the route at ``path``."""
    if path != ANTHROPIC_PATH and not path.startswith(f"{ANTHROPIC_PATH}/"):
        return {"error": detail.model_dump()}
    kind = ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    message = detail.message
    if detail.code == QTOOL_CODES["E_TOO_LONG"] and not message.startswith(TOO_LONG):
        message = f"{TOO_LONG}: {message}"
    return {"type": "error", "error": {"type": kind, "message": message}}


def type_of(status: int) -> str:
    """Return OpenAI's type of the errors with ``status``."""
    return TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
