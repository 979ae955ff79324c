"""Strict JSON bodies: UTF-8 without lone surrogates, NaN and repeated keys."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn, cast

import msgspec
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException
from starlette.responses import Response

from qtool.errors import one_line
from qtool.serve.threads import Threads

MAX_NAME = 100
MAX_ERRORS = 1000  # that are described for one body


class JsonRoute(APIRoute):
    """A route whose body is strict JSON; a large one is read and checked in a thread."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the function that answers a request."""
        answer = super().get_route_handler()
        field = self.body_field
        model = None if field is None else cast(type[BaseModel], field.field_info.annotation)

        async def read_and_answer(request: Request) -> Response:
            given = JsonRequest(request.scope, request.receive)
            if model is not None and (body := await request.body()):
                state = request.app.state
                threads: Threads = state.threads
                given.parsed = await threads.run(
                    len(body), parse_body, body, model, state.strict_fields
                )
            return await answer(given)

        return read_and_answer


class JsonRequest(Request):
    """A request whose body has been parsed."""

    parsed: BaseModel | None = None
    """None: it has no body."""

    async def body(self) -> bytes:
        """Return a stand-in for the body, so that FastAPI calls `json` if there is one."""
        return b"" if self.parsed is None else b"{}"

    async def json(self) -> object:
        """Return the body."""
        return self.parsed


def parse_body(body: bytes, model: type[BaseModel], strict_fields: bool = False) -> BaseModel:
    """Return ``body`` as ``model``.

    Args:
        body: JSON.
        model: what it must be.
        strict_fields: whether fields that would be ignored are refused.
    Raises: HTTPException, if it is not strict JSON; RequestValidationError.
    """
    value = parse_json(body)
    try:
        return model.model_validate(value, extra="forbid" if strict_fields else None)
    except ValidationError as error:
        count = error.error_count()
        errors = error.errors(include_url=False) if count <= MAX_ERRORS else [_too_many(count)]
        raise RequestValidationError(errors) from None


def _too_many(count: int) -> ErrorDetails:
    """Return one error in place of ``count``, which would take too long to describe."""
    message = f"the body has {count:,} unknown fields or values of another type"
    return {"type": "too_many_errors", "loc": ("body",), "msg": message, "input": None}


def parse_json(body: bytes) -> object:
    """Return the value of ``body``. Raises: HTTPException, if it is not strict JSON."""
    try:
        value = msgspec.json.decode(body)
    except (ValueError, RecursionError):
        return _refuse(body)
    if body.count(b":") > 1 and _count_members(value) < outside_strings(body).count(b":"):
        return _refuse(body)
    return value


def outside_strings(body: bytes) -> bytes:
    """Return what stands outside of the strings of ``body``, if it is JSON."""
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    return b"".join(plain.split(b'"')[::2])


def _count_members(value: object) -> int:
    """Return the number of members of all objects in ``value``."""
    count = 0
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            count += len(one)
            waiting += [member for member in one.values() if isinstance(member, (dict, list))]
        elif isinstance(one, list):
            waiting += [member for member in one if isinstance(member, (dict, list))]
    return count


def _refuse(body: bytes) -> NoReturn:
    """Raise: HTTPException with what is wrong with ``body``, which takes longer to find."""
    try:
        value = _DECODER.decode(body.decode())
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise HTTPException(400, "the body has half of a surrogate pair") from None
    except RecursionError:
        raise HTTPException(400, "the body is nested too deeply") from None
    except ValueError as error:
        raise HTTPException(400, f"the body is not valid JSON: {one_line(error)}") from None
    raise HTTPException(400, "the body is not valid JSON: a number is out of range")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"the key `{name[:MAX_NAME]}` is there twice")
            seen.add(name)
    return found


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_unique)
