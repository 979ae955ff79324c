"""Requests for embeddings and scores, and what SGLang's ``Engine.encode`` returns for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from qtool.checkpoint.encoding import Encoding
from qtool.engine.detokenizer import TextStream
from qtool.engine.outputs import CompletionOutput
from qtool.engine.prompts import names_of
from qtool.engine.requests import Request, RequestParser
from qtool.engine.step import SequenceState
from qtool.engine.vectors import NO_TEXT, vector_of
from qtool.errors import UsageError


@dataclass(frozen=True)
class EncodeRequest:
    """The arguments of `Engine.encode` that its loop needs, under SGLang's names."""

    prompt: str | Sequence[str] | None = None
    input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None
    """Tokens in place of ``prompt``."""
    rid: str | Sequence[str] | None = None
    cache_salt: str = ""
    """Only requests with the same one find each other's prompts in the prefix cache."""


class Encoded(TypedDict):
    """What `Engine.encode` returns for one text."""

    embedding: list[float]
    meta_info: dict[str, object]


def encode_requests(parser: RequestParser, given: EncodeRequest) -> tuple[list[Request], bool]:
    """Return the requests for ``given``, and whether its result is a single one, not a list.

    Raises: UsageError.
    """
    if parser.encoding is None:
        raise UsageError(
            "E_TASK",
            "the model generates text; embeddings are not offered",
            hint="is_embedding makes embeddings of the hidden states of a language model",
        )
    prompts, single = parser.prompts.read(given.prompt, given.input_ids)
    names = names_of(given.rid, len(prompts))
    if len(names) != len(prompts):
        message = f"{len(prompts)} prompts and {len(names)} ids"
        raise UsageError("E_PROMPT", message, hint="give one rid for each prompt")
    return [
        _request(parser, tokens, name, index, given.cache_salt)
        for index, (tokens, name) in enumerate(zip(prompts, names, strict=True))
    ], single


def _request(
    parser: RequestParser, tokens: list[int], name: str, index: int, cache_salt: str
) -> Request:
    return Request(
        id=name,
        group=name,
        index=index,
        sequence=SequenceState(
            tokens, 0, use_prefix=parser.use_prefix, cache_salt=cache_salt, is_encoded=True
        ),
        params=NO_TEXT,
        seed=0,
        text=TextStream(None, NO_TEXT, (), max_new_tokens=1),
        stream=False,
        history=None,
        constraint=None,
        top_logprobs=None,
        prompt_logprobs_from=None,
    )


def encoded(
    encoding: Encoding, request: Request, output: CompletionOutput, dimensions: int | None
) -> Encoded:
    """Return the result of ``request``."""
    finish = output.finish
    assert finish is not None
    return {
        "embedding": vector_of(encoding, output.vector, dimensions).tolist(),
        "meta_info": {
            "id": request.id,
            "finish_reason": finish.reason,
            "prompt_tokens": finish.prompt_tokens,
            "cached_tokens": finish.cached_tokens,
            "e2e_latency": finish.latency_s,
        },
    }
