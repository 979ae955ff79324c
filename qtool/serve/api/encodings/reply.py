"""`POST /v1/embeddings`, `/v1/score` and `/v1/rerank`: texts that are encoded and not continued."""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from typing import cast

import msgspec
from msgspec import UNSET
from starlette.responses import Response

from qtool.engine.vectors import NO_TEXT, Vector, check_dimensions, vector_of
from qtool.errors import UsageError
from qtool.serve.api.answering import json_reply
from qtool.serve.api.encodings.protocol import EmbeddingRequest, RerankRequest, ScoreRequest
from qtool.serve.api.encodings.schemas import (
    Embedding,
    Embeddings,
    EncodingUsage,
    RankedDocument,
    RankedText,
    Ranking,
    Score,
    Scores,
)
from qtool.serve.api.fields import as_prompts
from qtool.serve.api.prompt import tokenize_prompts
from qtool.serve.api.replies import Account, log_request
from qtool.serve.backend.messages import Submission
from qtool.serve.service import Service

WINDOW = 128  # prompts of a request that the engine has at a time
NUMBER_BYTES = 20  # of a number in JSON


class _Run:
    """One request: the slots that it holds, what it used, and its vectors."""

    def __init__(self, service: Service, kind: str, rid: str | None, prompts: int) -> None:
        assert service.info.encoding is not None
        self._service = service
        self._encoding = service.info.encoding
        self._account = Account(kind, service.metrics, streamed=False)
        self.id = rid or service.new_id(kind)
        self._window = min(WINDOW, service.largest_request)
        self._slots = min(prompts, self._window)
        self.created = int(time.time())

    async def vectors(
        self,
        prompts: Sequence[Sequence[int]],
        dimensions: int | None = None,
        *,
        activate: bool = True,
    ) -> list[Vector]:
        """Return the vector of each of ``prompts``, some of them at a time.

        Raises: UsageError, for a prompt that is empty or too long; Busy.
        """
        service, found = self._service, list[bytes]()
        self._account.expect(prompts)
        try:
            with service.acquire(self._slots) as slot:
                service.check_prompts(prompts)
                for start in range(0, len(prompts), self._window):
                    some = prompts[start : start + self._window]
                    submission = Submission(some, NO_TEXT, stream=False, rid=self.id)
                    stream = service.submit(slot, [submission], [None])
                    outputs = await stream.collect()
                    service.engine.cancel(stream)  # the slot forgets it with the next
                    for output in outputs:
                        shifted = msgspec.structs.replace(output, index=output.index + start)
                        self._account.note(shifted, 1)
                    found += [output.vector for output in outputs]
        finally:
            self._account.close(self.id)
        if not all(found):
            service.ready()  # or the server is ending
            raise UsageError("E_ABORTED", "the request was aborted", hint="send it again")
        return [vector_of(self._encoding, data, dimensions, activate=activate) for data in found]

    def usage(self) -> EncodingUsage:
        """Return the tokens of the request."""
        tokens = self._account.usage().prompt_tokens
        return EncodingUsage(prompt_tokens=tokens, total_tokens=tokens)


async def embed(service: Service, body: EmbeddingRequest) -> Response:
    """Answer ``body``. Raises: UsageError, ModelNotFound, Busy."""
    service.check_model(body.model)
    encoding = service.info.encoding
    assert encoding is not None
    check_dimensions(encoding, body.dimensions)
    given = as_prompts(body.input)
    run = _Run(service, "embd", body.rid, len(given))
    special = body.add_special_tokens is not False
    prompts = await tokenize_prompts(service, given, add_special_tokens=special)
    log_request(given, NO_TEXT, service.settings)
    activate = body.use_activation is not False
    vectors = await run.vectors(prompts, body.dimensions, activate=activate)
    as_text = body.encoding_format == "base64"

    def reply() -> Response:
        return json_reply(
            Embeddings(
                id=run.id,
                object="list",
                created=run.created,
                model=body.model or service.settings.name,
                data=[
                    Embedding("embedding", index, _as_base64(one) if as_text else one.tolist())
                    for index, one in enumerate(vectors)
                ],
                usage=run.usage(),
            )
        )

    return await service.threads.run(NUMBER_BYTES * sum(map(len, vectors)), reply)


def _as_base64(vector: Vector) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


async def score(service: Service, body: ScoreRequest) -> Response:
    """Answer ``body``. Raises: UsageError, ModelNotFound, Busy."""
    service.check_model(body.model)
    pairs = _pairs(body)
    run = _Run(service, "score", body.rid, len(pairs))
    scores = await _scores(service, run, pairs, body.wanted, body.use_activation)
    return json_reply(
        Scores(
            id=run.id,
            object="list",
            created=run.created,
            model=body.model or service.settings.name,
            data=[Score("score", index, one) for index, one in enumerate(scores)],
            usage=run.usage(),
        )
    )


def _pairs(body: ScoreRequest) -> list[tuple[str, str]]:
    """Return what is scored: the texts of both sides in pairs, or one with each of the others.

    Raises: UsageError.
    """
    sides: list[list[str]] = []
    for names in (("text_1", "queries", "data_1"), ("text_2", "documents", "items", "data_2")):
        given = [getattr(body, name) for name in names if getattr(body, name) is not None]
        if len(given) != 1:
            message = f"give one of {', '.join(f'`{name}`' for name in names)}"
            raise UsageError("E_PROMPT", message, hint="text_1 and text_2 are vLLM's names")
        sides.append([given[0]] if isinstance(given[0], str) else cast(list[str], given[0]))
    first, second = sides
    if len(first) == 1:
        first = first * len(second)
    if len(first) != len(second):
        message = f"{len(first)} texts on one side and {len(second)} on the other"
        raise UsageError("E_PROMPT", message, hint="as many on both sides, or one on the first")
    return list(zip(first, second, strict=True))


async def rerank(service: Service, body: RerankRequest, *, repeat: bool) -> Response:
    """Answer ``body``. Raises: UsageError, ModelNotFound, Busy.

    Args:
        service: the served model.
        body: the request.
        repeat: whether documents are in the reply to a request that does not say it.
    """
    service.check_model(body.model)
    texts = [one if isinstance(one, str) else one.text for one in body.documents]
    run = _Run(service, "rerank", body.rid, len(texts))
    pairs = [(body.query, text) for text in texts]
    scores = await _scores(service, run, pairs, body.wanted, body.use_activation)
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    shows = repeat if body.return_documents is None else body.return_documents
    return json_reply(
        Ranking(
            id=run.id,
            model=body.model or service.settings.name,
            results=[
                RankedDocument(index, scores[index], RankedText(texts[index]) if shows else UNSET)
                for index in order[: body.top_n or None]
            ],
            usage=run.usage(),
        )
    )


async def _scores(
    service: Service,
    run: _Run,
    pairs: Sequence[tuple[str, str]],
    instruction: str | None,
    use_activation: bool | None,
) -> list[float]:
    log_request(pairs, NO_TEXT, service.settings)
    prompts = await service.pairs.tokenize(pairs, instruction)
    vectors = await run.vectors(prompts, activate=use_activation is not False)
    return [float(vector[0]) for vector in vectors]
