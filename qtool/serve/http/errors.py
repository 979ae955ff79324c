"""Errors over HTTP: the one table of their statuses, and OpenAI's shape for them."""

from __future__ import annotations

import json

# What the server itself refuses: code -> status
STATUSES = {
    "bad_request": 400,
    "too_many_values": 400,
    "invalid_api_key": 401,
    "host_not_allowed": 403,
    "body_timeout": 408,
    "header_timeout": 408,
    "body_too_large": 413,
    "unsupported_encoding": 415,
    "unsupported_media_type": 415,
    "headers_too_large": 431,
    "busy": 503,
    "draining": 503,
    "too_many_connections": 503,
}
# OpenAI's type of an error: status -> type
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    503: "service_unavailable_error",
}


class Refused(Exception):
    """A request that no route should see: ``code`` is a key of `STATUSES`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.status = STATUSES[code]

    def to_json(self) -> bytes:
        """Return the error in OpenAI's shape."""
        detail = {
            "message": self.message,
            "type": TYPES.get(self.status, "invalid_request_error"),
            "param": None,
            "code": self.code,
        }
        return json.dumps({"error": detail}).encode()
