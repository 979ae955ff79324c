"""What /openapi.json says of responses: errors, and events."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from qtool.serve.api.schemas import CHUNKS, ErrorReply

Responses = dict[int | str, dict[str, Any]]
SCHEMAS = "#/components/schemas/{model}"
ERRORS: Responses = {
    status: {"model": ErrorReply, "description": description}
    for status, description in (
        (400, "The request is invalid."),
        (401, "The API key is missing or wrong."),
        (403, "The server does not answer to that name."),
        (404, "There is no such model."),
        (408, "The body did not arrive in time."),
        (413, "The body is too large."),
        (415, "The body is not of type application/json."),
        (429, "The queue is full; Retry-After says when to try again."),
        (503, "The server is loading or ending, or has reached one of its limits."),
    )
}
GET_ERRORS: Responses = {status: ERRORS[status] for status in (401, 403, 503)}


def whole_or_streamed(whole: object, chunk: type[BaseModel]) -> Responses:
    """Return the responses of a route that answers with ``whole``, or with events of ``chunk``."""
    parts = [
        {
            "contentMediaType": "application/json",
            "contentSchema": {"$ref": SCHEMAS.format(model=kind.__name__)},
        }
        for kind in (chunk, ErrorReply)
    ]
    data = {"type": "string", "anyOf": [*parts, {"const": "[DONE]"}]}
    stream = {"itemSchema": {"type": "object", "properties": {"data": data}, "required": ["data"]}}
    success = {
        "model": whole,
        "description": "The whole answer; with `stream`, events, each with a part of it.",
        "content": {"text/event-stream": stream},
    }
    return {**ERRORS, 200: success}


def make_openapi(app: FastAPI, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the schema of ``app`` with the schemas of events, and without FastAPI's 422, which is
    a 400 here.
    """
    if app.openapi_schema is None:
        schema = make()
        for operations in schema["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        schemas = schema["components"]["schemas"]
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        _, events = models_json_schema(
            [(chunk, "validation") for chunk in CHUNKS], ref_template=SCHEMAS
        )
        schemas.update({name: schemas.get(name, one) for name, one in events["$defs"].items()})
    return cast(dict[str, Any], app.openapi_schema)
