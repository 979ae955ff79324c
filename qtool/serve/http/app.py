"""The routes.

Each parses, calls one function, and returns what that returns; errors become OpenAI's shape here
alone.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import asdict
from functools import partial
from importlib import resources
from typing import Any, NoReturn, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response

from qtool import __version__
from qtool.errors import QtoolError, UsageError, one_line
from qtool.serve.api.answering import error_reply, gone, json_reply
from qtool.serve.api.chat import chat
from qtool.serve.api.completions import complete
from qtool.serve.api.fields import as_lists
from qtool.serve.api.native import generate
from qtool.serve.api.prompt import render_prompt
from qtool.serve.api.protocol import (
    AbortRequest,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerateRequest,
    TokenizeRequest,
)
from qtool.serve.api.schemas import (
    CHUNKS,
    ChatChunk,
    ChatCompletion,
    Completion,
    CompletionChunk,
    ErrorDetail,
    ErrorReply,
    Generation,
    GenerationChunk,
    Model,
    ModelInfo,
    Models,
    ServerInfo,
    Status,
    Success,
    Text,
    Tokens,
    Version,
)
from qtool.serve.api.validation import describe_invalid_body
from qtool.serve.backend.messages import EngineStats
from qtool.serve.metrics import CONTENT_TYPE
from qtool.serve.prompts.sandbox import TooManyWaiting
from qtool.serve.service import Busy, ModelNotFound, Service
from qtool.serve.settings import RETRY_AFTER_S

LOG = logging.getLogger("qtool.serve")
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply, "description": description}
    for status, description in (
        (400, "The request cannot be served as it is."),
        (401, "The API key is missing or wrong."),
        (403, "The server does not answer to that name."),
        (404, "There is no such model."),
        (408, "The body did not come in time."),
        (413, "The body is too large."),
        (415, "The body is not of type application/json."),
        (429, "The queue is full; Retry-After says when to come again."),
        (503, "The server is loading or ending, or a limit of it is reached."),
    )
}
# of what has no body
LOOKS: dict[int | str, dict[str, Any]] = {status: ERRORS[status] for status in (401, 403, 503)}
SCHEMAS = "#/components/schemas/{model}"
MAX_CHARACTERS = 1 << 20  # of several prompts to be tokenized
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src "
    "'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def make_app(service: Service) -> FastAPI:
    """Return the application that serves ``service``."""
    app = FastAPI(
        title="qtool",
        version=__version__,
        openapi_url="/openapi.json",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.router.route_class = _Route
    app.openapi = partial(_openapi, app, app.openapi)  # type: ignore[method-assign]
    _add_error_handlers(app)
    _add_text_routes(app, service)
    _add_token_routes(app, service)
    _add_facts(app, service)
    return app


def _openapi(app: FastAPI, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the schema of ``app`` with those of events, and without FastAPI's 422: what it would
    be for is a 400 here.
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


class _Route(APIRoute):
    """A route that reads bodies as `_Request` does."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return what answers a request."""
        answer = super().get_route_handler()

        async def read_and_answer(request: Request) -> Response:
            return await answer(_Request(request.scope, request.receive))

        return read_and_answer


class _Request(Request):
    """A request whose body is JSON to the letter: in UTF-8, without NaN, of whole characters."""

    async def json(self) -> Any:
        """Return the body. Raises: HTTPException, when it is not that."""
        body = await self.body()
        try:
            value = JSON.decode(body.decode())
            if b"\\ud" in body or b"\\uD" in body:  # halves of characters, in pairs or not
                json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise HTTPException(400, "the body has half of a surrogate pair") from None
        except RecursionError:
            raise HTTPException(400, "the body is nested too deeply") from None
        except ValueError as error:
            raise HTTPException(400, f"the body is no JSON: {one_line(error)}") from None
        return value


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


JSON = json.JSONDecoder(parse_constant=_no_number)


def _add_text_routes(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/chat/completions",
        responses=_whole_or_streamed(ChatCompletion, ChatChunk),
        tags=["OpenAI"],
    )
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a chat."""
        return await _while_connected(service, request, chat(service, body))

    @app.post(
        "/v1/completions",
        responses=_whole_or_streamed(Completion, CompletionChunk),
        tags=["OpenAI"],
    )
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue one or several prompts."""
        return await _while_connected(service, request, complete(service, body))

    @app.post(
        "/generate",
        responses=_whole_or_streamed(Generation | list[Generation], GenerationChunk),
        tags=["SGLang"],
    )
    async def generate_text(body: GenerateRequest, request: Request) -> Response:
        """Continue one or several prompts, as SGLang's native route does."""
        return await _while_connected(service, request, generate(service, body))

    @app.post("/abort_request", responses=ERRORS, tags=["SGLang"])
    async def abort_request(body: AbortRequest) -> Success:
        """End the requests of that ``rid``: they answer with what they have."""
        service.check_ready()
        service.engine.abort(body.rid)
        return Success(success=True)


def _whole_or_streamed(whole: Any, chunk: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    parts = [
        {
            "contentMediaType": "application/json",
            "contentSchema": {"$ref": SCHEMAS.format(model=kind.__name__)},
        }
        for kind in (chunk, ErrorReply)
    ]
    data = {"type": "string", "anyOf": [*parts, {"const": "[DONE]"}]}
    stream = {"itemSchema": {"type": "object", "properties": {"data": data}, "required": ["data"]}}
    description = "The whole answer; with `stream`, events, each with a part of it."
    return {
        **ERRORS,
        200: {"model": whole, "description": description, "content": {"text/event-stream": stream}},
    }


def _add_token_routes(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize", responses={**ERRORS, 200: {"model": Tokens}}, tags=["tokens"])
    async def tokenize(body: TokenizeRequest) -> Response:
        """Return the tokens of a prompt, or of messages through the chat template."""
        service.check_ready()
        service.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise UsageError(
                "E_PROMPT", "give either prompt or messages", hint="one of them, and not both"
            )
        special = body.add_special_tokens is not False
        if body.messages is not None:
            _, tokens = await render_prompt(service, body.tools or (), body)
        elif isinstance(body.prompt, list):
            if sum(map(len, body.prompt)) > MAX_CHARACTERS:
                raise UsageError(
                    "E_PROMPT",
                    "the prompts are too long for one request",
                    hint=f"{MAX_CHARACTERS:,} characters at a time",
                )
            many = [
                await service.vocabulary.encode(one, add_special_tokens=special)
                for one in body.prompt
            ]
            return json_reply(
                {
                    "tokens": many,
                    "count": [len(one) for one in many],
                    "max_model_len": service.info.context_length,
                }
            )
        else:
            tokens = await service.vocabulary.encode(str(body.prompt), add_special_tokens=special)
        return json_reply(
            {
                "tokens": tokens,
                "count": len(tokens),
                "max_model_len": service.info.context_length,
            }
        )

    @app.post("/detokenize", responses=ERRORS, tags=["tokens"])
    async def detokenize(body: DetokenizeRequest) -> Text:
        """Return the text of tokens, or of several lists of them."""
        service.check_ready()
        service.check_model(body.model)
        several = isinstance(body.tokens[0], list)
        texts = []
        for tokens in as_lists(body.tokens):
            if max(tokens) >= service.info.vocab_size:
                raise UsageError(
                    "E_PROMPT",
                    f"there is no token {max(tokens)}",
                    hint=f"the model knows {service.info.vocab_size}",
                )
            texts.append(
                service.vocabulary.decode(
                    tokens, skip_special_tokens=body.skip_special_tokens is not False
                )
            )
        text: Any = texts if several else texts[0]
        return Text(text=text, prompt=text)


def _add_facts(app: FastAPI, service: Service) -> None:
    page = (resources.files("qtool.serve.http") / "page.html").read_text(encoding="utf-8")

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def show_page() -> Response:
        """Return the page to try the model by hand."""
        return HTMLResponse(
            page,
            headers={
                "content-security-policy": PAGE_POLICY,
                "x-content-type-options": "nosniff",
                "referrer-policy": "no-referrer",
            },
        )

    @app.get("/health", responses={403: ERRORS[403], 503: ERRORS[503]}, tags=["server"])
    async def health() -> Status:
        """Say 200 once the model has answered, and until the server ends."""
        service.check_ready()
        return Status(status="ok")

    @app.get(
        "/health_generate",
        responses={**LOOKS, 429: ERRORS[429], 200: {"model": Status}},
        tags=["SGLang"],
    )
    async def health_generate(request: Request) -> Response:
        """Let the model answer once more, and say 200 if it does."""
        return await _while_connected(service, request, _answer_once(service))

    @app.get(
        "/metrics", response_class=PlainTextResponse, responses={403: ERRORS[403]}, tags=["server"]
    )
    async def metrics() -> Response:
        """Return counts and times for Prometheus."""
        return Response(
            service.metrics.render(await _engine_stats(service)), media_type=CONTENT_TYPE
        )

    @app.get("/version", responses={403: ERRORS[403]}, tags=["server"])
    async def version() -> Version:
        """Return the version that serves."""
        return Version(version=__version__)

    @app.get("/v1/models", responses=LOOKS, tags=["OpenAI"])
    async def models() -> Models:
        """List the one model that is served."""
        service.check_ready()
        return Models(object="list", data=[_model(service)])

    @app.get("/v1/models/{name:path}", responses={**LOOKS, 404: ERRORS[404]}, tags=["OpenAI"])
    async def model(name: str) -> Model:
        """Return the model, if it is of that name."""
        service.check_ready()
        service.find_model(name)
        return _model(service)

    @app.get("/get_model_info", responses=LOOKS, tags=["SGLang"])
    async def get_model_info() -> ModelInfo:
        """Return what the model is."""
        service.check_ready()
        tokenizer_path = service.settings.tokenizer_path or service.settings.model_path
        return ModelInfo(
            model_path=service.settings.model_path,
            tokenizer_path=str(tokenizer_path),
            is_generation=True,
        )

    @app.get("/get_server_info", responses={**LOOKS, 200: {"model": ServerInfo}}, tags=["SGLang"])
    async def get_server_info() -> Response:
        """Return how the server runs, and what it does now."""
        service.check_ready()
        facts = {
            name: value
            for name, value in asdict(service.info).items()
            if name not in ("tokenizer", "tokenizer_path", "eos_ids", "model_path")
        }
        stats = await _engine_stats(service)
        flags = {
            **service.settings.to_dict(),
            **facts,
            "served_model_name": service.settings.name,
            "status": service.state,
        }
        return json_reply(
            {
                **flags,
                "version": __version__,
                "max_total_num_tokens": service.info.max_total_tokens,
                "internal_states": [
                    {"places_taken": service.slots_in_use, **(asdict(stats) if stats else {})}
                ],
            }
        )


async def _answer_once(service: Service) -> Response:
    with service.acquire(1):
        await service.warm_up()
    return json_reply({"status": "ok"})


def _model(service: Service) -> Model:
    return Model(
        id=service.settings.name,
        object="model",
        created=service.started,
        owned_by="qtool",
        root=service.settings.model_path,
        max_model_len=service.info.context_length,
    )


async def _engine_stats(service: Service) -> EngineStats | None:
    if service.state == "loading" or service.failure is not None:
        return None
    try:
        return await service.engine.stats()
    except TimeoutError:
        return None


async def _while_connected(
    service: Service, request: Request, answer: Awaitable[Response]
) -> Response:
    """Return ``answer``, unless the client leaves before: then it is cancelled, and what runs for
    it ends. Raises: Busy.
    """
    answering = asyncio.ensure_future(answer)
    watching = asyncio.create_task(gone(request.receive))
    try:
        service.check_ready()
        await asyncio.wait({answering, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            return Response(status_code=499)  # nobody reads it
        return answering.result()
    finally:
        for task in (answering, watching):
            task.cancel()
        await asyncio.gather(answering, watching, return_exceptions=True)


def _add_error_handlers(app: FastAPI) -> None:
    async def known(request: Request, error: Exception) -> Response:
        status, reply = error_reply(error)
        headers = {"retry-after": str(RETRY_AFTER_S)} if status in (429, 503) else None
        return json_reply(reply.model_dump(), status=status, headers=headers)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return json_reply(
            ErrorReply(
                error=describe_invalid_body(error.errors(), _body_model(request))
            ).model_dump(),
            status=400,
        )

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        kind = "invalid_request_error" if error.status_code < 500 else "server_error"
        detail = ErrorDetail(
            message=str(error.detail),
            type=kind,
            code={400: "invalid_json", 404: "not_found", 405: "method_not_allowed"}.get(
                error.status_code
            ),
        )
        return json_reply(
            ErrorReply(error=detail).model_dump(), status=error.status_code, headers=error.headers
        )

    async def bug(request: Request, error: Exception) -> Response:
        LOG.error("%s %r failed", request.method, request.url.path[:200], exc_info=error)
        detail = ErrorDetail(
            message=f"a bug in qtool: {type(error).__name__}", type="server_error", code="bug"
        )
        return JSONResponse(ErrorReply(error=detail).model_dump(), status_code=500)

    for kind in (QtoolError, Busy, ModelNotFound, TooManyWaiting):
        app.add_exception_handler(kind, known)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, bug)


def _body_model(request: Request) -> type[BaseModel]:
    field = request.scope["route"].body_field
    model: type[BaseModel] = field.field_info.annotation
    return model
