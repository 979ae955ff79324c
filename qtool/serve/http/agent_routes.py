"""The routes that agents speak: OpenAI's responses and Anthropic's messages."""

from __future__ import annotations

from fastapi import FastAPI, Request
from starlette.responses import Response

from qtool.serve.api.answering import while_connected
from qtool.serve.api.messages.protocol import MessagesRequest
from qtool.serve.api.messages.reply import answer_message, count_tokens
from qtool.serve.api.messages.schemas import (
    GENERATED,
    AnthropicError,
    TokenCount,
)
from qtool.serve.api.responses import schemas as responses
from qtool.serve.api.responses.protocol import ResponsesRequest
from qtool.serve.api.responses.reply import count_input_tokens, respond
from qtool.serve.host import ServiceHost
from qtool.serve.http.openapi import ERRORS, errors_of, whole_or_events


def add_agent_routes(app: FastAPI, host: ServiceHost) -> None:
    """Add the routes of OpenAI's responses and Anthropic's messages."""

    @app.post("/v1/responses", responses=whole_or_events(*responses.GENERATED), tags=["OpenAI"])
    async def create_response(body: ResponsesRequest, request: Request) -> Response:
        """Answer a conversation, as OpenAI's responses; nothing is stored."""
        return await while_connected(request, respond(host.ready("generate"), body))

    @app.post("/v1/responses/input_tokens", responses=ERRORS, tags=["OpenAI"])
    async def count_response_tokens(body: ResponsesRequest) -> responses.InputTokenCount:
        """Count the tokens of a conversation, as OpenAI's responses take it."""
        tokens = await count_input_tokens(host.ready("generate"), body)
        return responses.InputTokenCount(input_tokens=tokens)

    @app.post(
        "/v1/messages",
        responses=whole_or_events(*GENERATED, error=AnthropicError),
        tags=["Anthropic"],
    )
    async def messages(body: MessagesRequest, request: Request) -> Response:
        """Answer a conversation, as Anthropic does."""
        return await while_connected(request, answer_message(host.ready("generate"), body))

    @app.post("/v1/messages/count_tokens", responses=errors_of(AnthropicError), tags=["Anthropic"])
    async def count_message_tokens(body: MessagesRequest) -> TokenCount:
        """Count the tokens of a conversation."""
        return TokenCount(input_tokens=await count_tokens(host.ready(), body))
