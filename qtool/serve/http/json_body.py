"""Strict JSON bodies: in UTF-8, without NaN, and of whole characters."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import Response

from qtool.errors import one_line


class JsonRoute(APIRoute):
    """A route that reads bodies as `JsonRequest` does."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the function that answers a request."""
        answer = super().get_route_handler()

        async def read_and_answer(request: Request) -> Response:
            return await answer(JsonRequest(request.scope, request.receive))

        return read_and_answer


class JsonRequest(Request):
    """A request whose body must be strict JSON."""

    async def json(self) -> object:
        """Return the body. Raises: HTTPException, if it is not strict JSON."""
        body = await self.body()
        try:
            value: object = _DECODER.decode(body.decode())
            if b"\\ud" in body or b"\\uD" in body:  # surrogates, in pairs or not
                json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise HTTPException(400, "the body has half of a surrogate pair") from None
        except RecursionError:
            raise HTTPException(400, "the body is nested too deeply") from None
        except ValueError as error:
            raise HTTPException(400, f"the body is not valid JSON: {one_line(error)}") from None
        return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
