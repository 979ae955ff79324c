"""The routes that generate text: OpenAI's and SGLang's."""

from __future__ import annotations

from fastapi import FastAPI, Request
from starlette.responses import Response

from qtool.errors import UsageError
from qtool.serve.api.answering import while_connected
from qtool.serve.api.chat_completions import chat
from qtool.serve.api.completions import complete
from qtool.serve.api.native import generate
from qtool.serve.api.protocol import AbortRequest, ChatRequest, CompletionRequest, GenerateRequest
from qtool.serve.api.schemas import (
    ChatChunk,
    ChatCompletion,
    Completion,
    CompletionChunk,
    Generation,
    GenerationChunk,
    Success,
)
from qtool.serve.host import ServiceHost
from qtool.serve.http.openapi import ERRORS, GET_ERRORS, whole_or_streamed


def add_generation_routes(app: FastAPI, host: ServiceHost) -> None:
    """Add the routes that generate text, and the one that aborts them."""

    @app.post(
        "/v1/chat/completions",
        responses=whole_or_streamed(ChatCompletion, ChatChunk),
        tags=["OpenAI"],
    )
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a chat."""
        return await while_connected(request, chat(host.ready("generate"), body))

    @app.post(
        "/v1/completions",
        responses=whole_or_streamed(Completion, CompletionChunk),
        tags=["OpenAI"],
    )
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue one or several prompts."""
        return await while_connected(request, complete(host.ready("generate"), body))

    @app.post(
        "/generate",
        responses=whole_or_streamed(Generation, GenerationChunk, may_be_list=True),
        tags=["SGLang"],
    )
    async def generate_text(body: GenerateRequest, request: Request) -> Response:
        """Continue one or several prompts, as SGLang's native route does."""
        return await while_connected(request, generate(host.ready("generate"), body))

    @app.post("/abort_request", responses=ERRORS, tags=["SGLang"])
    async def abort_request(body: AbortRequest) -> Success:
        """Abort the requests with that ``rid``, or all: they answer with what they have."""
        if body.rid is None and not body.abort_all:
            raise UsageError("E_REQUEST_ID", "give a rid, or abort_all", hint="one of them")
        host.ready().engine.abort(None if body.abort_all else body.rid)
        return Success(success=True)

    @app.get("/flush_cache", responses=GET_ERRORS, tags=["SGLang"], operation_id="flush_cache_get")
    @app.post("/flush_cache", responses=GET_ERRORS, tags=["SGLang"])
    async def flush_cache() -> Success:
        """Let no request after this one start with what an earlier one has left in the cache."""
        host.ready().engine.flush_cache()
        return Success(success=True)
