"""The routes that tokenize and detokenize."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI
from starlette.responses import Response

from qtool.errors import UsageError
from qtool.serve.api.answering import json_reply
from qtool.serve.api.fields import as_lists, is_single
from qtool.serve.api.prompt import render_prompt
from qtool.serve.api.protocol import DetokenizeRequest, TokenizeRequest
from qtool.serve.api.schemas import Text, Tokens
from qtool.serve.api.tools.choice import choose
from qtool.serve.host import ServiceHost
from qtool.serve.http.openapi import ERRORS
from qtool.serve.service import Service
from qtool.serve.turns import current_origin

MAX_CHARACTERS = 1 << 20  # of several prompts in one request


def add_token_routes(app: FastAPI, host: ServiceHost) -> None:
    """Add the routes that tokenize and detokenize."""

    @app.post("/v1/tokenize", responses={**ERRORS, 200: {"model": Tokens}}, tags=["SGLang"])
    @app.post("/tokenize", responses={**ERRORS, 200: {"model": Tokens}}, tags=["tokens"])
    async def tokenize(body: TokenizeRequest) -> Response:
        """Return the tokens of a prompt, or of messages through the chat template."""
        service = host.ready()
        service.check_model(body.model)
        return json_reply(await _tokenize(service, body))

    @app.post("/v1/detokenize", responses=ERRORS, tags=["SGLang"])
    @app.post("/detokenize", responses=ERRORS, tags=["tokens"])
    async def detokenize(body: DetokenizeRequest) -> Text:
        """Return the text of tokens, or of several lists of them."""
        service = host.ready()
        service.check_model(body.model)
        lists = as_lists(body.tokens)
        await service.threads.run(current_origin().body_bytes, _check_tokens, service, lists)
        texts = await service.vocabulary.decode(
            lists, skip_special_tokens=body.skip_special_tokens is not False
        )
        text = texts[0] if is_single(body.tokens) else texts
        return Text(text=text, prompt=text)


async def _tokenize(service: Service, body: TokenizeRequest) -> dict[str, object]:
    """Return the reply to ``body``. Raises: UsageError."""
    if (body.prompt is None) == (body.messages is None):
        raise UsageError(
            "E_PROMPT", "give either prompt or messages", hint="one of them, and not both"
        )
    if isinstance(body.prompt, list):
        lists = await _encode_all(service, body.prompt, body)
    elif body.prompt is not None:
        lists = await _encode_all(service, [body.prompt], body)
    else:
        tools = choose(body.tools, body.tool_choice).tools
        _, tokens = await render_prompt(service, tools, body)
        lists = [tokens]
    each: dict[str, Sequence[object]] = {"tokens": lists, "count": [len(one) for one in lists]}
    if body.return_token_strs:
        each["token_strs"] = [await service.vocabulary.names_of(one) for one in lists]
    reply: dict[str, object] = {
        "token_strs": None,
        **each,
        "max_model_len": service.info.context_length,
    }
    if not isinstance(body.prompt, list):
        reply |= {name: values[0] for name, values in each.items()}
    return reply


async def _encode_all(
    service: Service, prompts: Sequence[str], body: TokenizeRequest
) -> list[list[int]]:
    if isinstance(body.prompt, list) and sum(map(len, prompts)) > MAX_CHARACTERS:
        raise UsageError(
            "E_PROMPT",
            "the prompts are too long for one request",
            hint=f"{MAX_CHARACTERS:,} characters at a time",
        )
    special = body.add_special_tokens is not False
    return await service.vocabulary.encode(prompts, add_special_tokens=special)


def _check_tokens(service: Service, lists: Sequence[Sequence[int]]) -> None:
    """Raise: UsageError, if the model lacks one of the tokens."""
    largest = max(max(tokens, default=0) for tokens in lists)
    if largest >= service.info.vocab_size:
        raise UsageError(
            "E_PROMPT",
            f"there is no token {largest}",
            hint=f"token ids are whole numbers from 0 to {service.info.vocab_size - 1}",
        )
