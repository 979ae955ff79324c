"""What /openapi.json says of responses: errors, and events."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import msgspec
from fastapi import FastAPI
from msgspec import Struct
from pydantic import BaseModel

from qtool.serve.api.encodings import schemas as encodings
from qtool.serve.api.fields import Json
from qtool.serve.api.messages import schemas as messages
from qtool.serve.api.responses import schemas as responses
from qtool.serve.api.schemas import GENERATED, ErrorReply

Responses = dict[int | str, dict[str, Any]]
REFERENCE = "#/components/schemas/{name}"
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


def whole_or_streamed(
    whole: type[Struct], chunk: type[Struct], *, may_be_list: bool = False
) -> Responses:
    """Return the responses of a route that answers with ``whole``, or with events of ``chunk``."""
    schema: Json = _reference(whole)
    if may_be_list:
        schema = {"anyOf": [schema, {"type": "array", "items": schema}]}
    parts = [
        {"contentMediaType": "application/json", "contentSchema": _reference(kind)}
        for kind in (chunk, ErrorReply)
    ]
    data = {"type": "string", "anyOf": [*parts, {"const": "[DONE]"}]}
    stream = {"itemSchema": {"type": "object", "properties": {"data": data}, "required": ["data"]}}
    success = {
        "description": "The whole answer; with `stream`, events, each with a part of it.",
        "content": {"application/json": {"schema": schema}, "text/event-stream": stream},
    }
    return {**ERRORS, 200: success}


def replies_with(*whole: type[Struct]) -> Responses:
    """Return the responses of a route that answers with one of ``whole``."""
    references = [_reference(one) for one in whole]
    schema = {"anyOf": references} if references[1:] else references[0]
    content = {"application/json": {"schema": schema}}
    return {**ERRORS, 200: {"description": "The answer.", "content": content}}


def whole_or_events(
    whole: type[Struct], *events: type[Struct], error: type[BaseModel] = ErrorReply
) -> Responses:
    """Return the responses of a route that answers with ``whole``, or with events of these types.

    Args:
        whole: the reply that is not streamed.
        events: types of the data of a stream.
        error: the shape of its errors.
    """
    data = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [*map(_reference, events), _reference(error)]},
    }
    properties = {"event": {"type": "string"}, "data": data}
    item = {"type": "object", "properties": properties, "required": ["event", "data"]}
    success = {
        "description": "The whole answer; with `stream`, events, each with a part of it.",
        "content": {
            "application/json": {"schema": _reference(whole)},
            "text/event-stream": {"itemSchema": item},
        },
    }
    return {**errors_of(error), 200: success}


def errors_of(shape: type[BaseModel]) -> Responses:
    """Return `ERRORS` in another shape."""
    return {status: {**error, "model": shape} for status, error in ERRORS.items()}


def _reference(kind: type[Struct] | type[BaseModel]) -> Json:
    return {"$ref": REFERENCE.format(name=kind.__name__)}


def make_openapi(app: FastAPI, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the schema of ``app`` with the schemas of generated text, and without FastAPI's 422,
    which is a 400 here.
    """
    if app.openapi_schema is None:
        schema = make()
        for operations in schema["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        schemas = schema["components"]["schemas"]
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        structs = (*GENERATED, *messages.GENERATED, *responses.GENERATED, *encodings.GENERATED)
        _, generated = msgspec.json.schema_components(structs, ref_template=REFERENCE)
        schemas.update(generated)
    return cast(dict[str, Any], app.openapi_schema)
