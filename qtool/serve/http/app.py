"""The FastAPI application: its routes, and how it answers errors."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from qtool import __version__
from qtool.errors import QtoolError
from qtool.sandbox import TooManyWaiting
from qtool.serve.api.answering import json_reply
from qtool.serve.api.schemas import ErrorDetail
from qtool.serve.api.validation import describe_invalid_body
from qtool.serve.host import ServiceHost
from qtool.serve.http.agent_routes import add_agent_routes
from qtool.serve.http.encoding_routes import add_encoding_routes
from qtool.serve.http.errors import (
    error_body,
    error_detail,
    http_error_detail,
    note_refusal,
    status_of,
)
from qtool.serve.http.generation_routes import add_generation_routes
from qtool.serve.http.info_routes import add_model_routes, add_server_routes
from qtool.serve.http.json_body import JsonRoute
from qtool.serve.http.openapi import make_openapi
from qtool.serve.http.reference_routes import add_reference_routes
from qtool.serve.http.token_routes import add_token_routes
from qtool.serve.service import Busy, ModelNotFound
from qtool.serve.settings import RETRY_AFTER_S

LOG = logging.getLogger("qtool.serve")


def make_app(host: ServiceHost) -> FastAPI:
    """Return the application whose routes call the service of ``host``."""
    app = FastAPI(
        title="qtool",
        version=__version__,
        openapi_url="/openapi.json",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.threads = host.threads
    app.state.metrics = host.metrics
    app.state.strict_fields = host.settings.strict_fields
    app.router.route_class = JsonRoute
    app.openapi = partial(make_openapi, app, app.openapi)  # type: ignore[method-assign]
    _add_error_handlers(app)
    add_generation_routes(app, host)
    add_agent_routes(app, host)
    add_encoding_routes(app, host)
    add_token_routes(app, host)
    add_server_routes(app, host)
    add_model_routes(app, host)
    add_reference_routes(app, host)
    return app


def _add_error_handlers(app: FastAPI) -> None:
    for kind in (QtoolError, Busy, ModelNotFound, TooManyWaiting):
        app.add_exception_handler(kind, _answer_known_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid_body)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(Exception, _answer_bug)


async def _answer_known_error(request: Request, error: Exception) -> Response:
    return _error_response(request, status_of(error), error_detail(error))


async def _answer_invalid_body(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    detail = describe_invalid_body(error.errors(), _body_model(request))
    return _error_response(request, HTTPStatus.BAD_REQUEST, detail)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    detail = http_error_detail(error.status_code, str(error.detail))
    return _error_response(request, error.status_code, detail, error.headers)


async def _answer_bug(request: Request, error: Exception) -> Response:
    LOG.error("%s %r failed", request.method, request.url.path[:200], exc_info=error)
    return _error_response(request, status_of(error), error_detail(error))


def _error_response(
    request: Request, status: int, detail: ErrorDetail, headers: Mapping[str, str] | None = None
) -> Response:
    note_refusal(request.app.state.metrics, request.scope, int(status), detail)
    if status in (429, 503):
        headers = {"retry-after": str(RETRY_AFTER_S)}
    return json_reply(error_body(request.url.path, status, detail), status=status, headers=headers)


def _body_model(request: Request) -> type[BaseModel]:
    field = request.scope["route"].body_field
    model: type[BaseModel] = field.field_info.annotation
    return model
