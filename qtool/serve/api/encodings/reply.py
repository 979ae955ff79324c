"""`POST /v1/embeddings`, `/v1/score` and `/v1/rerank`: texts that are encoded and not continued."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Sequence
from typing import cast

import msgspec
from msgspec import UNSET
from starlette.responses import Response

from qtool.engine.outputs import CompletionOutput
from qtool.engine.scores import (
    LABEL_PARAMS,
    check_complete,
    cosines,
    distinct_texts,
    instruction_not_shown,
    join_pairs,
    label_scores,
    make_pairs,
    rank,
)
from qtool.engine.vectors import NO_TEXT, Vector, check_dimensions, vector_of
from qtool.errors import UsageError
from qtool.serve.api.answering import json_reply
from qtool.serve.api.encodings.protocol import (
    SIDES,
    EmbeddingRequest,
    EncodingFields,
    RerankRequest,
    ScoreRequest,
)
from qtool.serve.api.encodings.schemas import (
    Embedding,
    Embeddings,
    EncodingUsage,
    LabelScores,
    RankedDocument,
    RankedText,
    Ranking,
    Score,
    Scores,
)
from qtool.serve.api.fields import PromptOrTokens, as_prompts
from qtool.serve.api.prompt import tokenize_prompts
from qtool.serve.api.replies import Account, log_request
from qtool.serve.backend.messages import Submission
from qtool.serve.prompts.pairs import check_characters
from qtool.serve.service import Service
from qtool.serve.turns import name_request

WINDOW = 128  # prompts of a request that the engine has at a time
NUMBER_BYTES = 20  # of a number in JSON


class _Run:
    """One request: the slots that it holds, what it used, and what the engine returns for it."""

    def __init__(self, service: Service, kind: str, body: EncodingFields) -> None:
        self._service = service
        self._account = Account(kind, service.metrics, streamed=False)
        self.id = name_request(body.rid or service.new_id(f"{kind}-"))
        self._salt = body.salt
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
        encoding = self._service.info.encoding
        assert encoding is not None
        outputs = await self._outputs(
            prompts,
            lambda some: Submission(
                some, NO_TEXT, stream=False, rid=self.id, cache_salt=self._salt
            ),
        )
        return [
            vector_of(encoding, output.vector, dimensions, activate=activate) for output in outputs
        ]

    async def label_outputs(
        self, prompts: Sequence[Sequence[int]], labels: Sequence[int]
    ) -> list[CompletionOutput]:
        """Return for each of ``prompts`` an output that has the log probabilities of ``labels``.

        Raises: as `vectors`.
        """
        return await self._outputs(
            prompts,
            lambda some: Submission(
                some,
                LABEL_PARAMS,
                stream=False,
                rid=self.id,
                top_logprobs=0,
                label_token_ids=labels,
                cache_salt=self._salt,
            ),
        )

    async def _outputs(
        self,
        prompts: Sequence[Sequence[int]],
        submission: Callable[[Sequence[Sequence[int]]], Submission],
    ) -> list[CompletionOutput]:
        """Return the outputs for ``prompts``, of which the engine has some at a time.

        Args:
            prompts: in tokens.
            submission: returns what the engine computes for some of them.
        Raises: UsageError, also when the request is aborted; Busy.
        """
        service, found = self._service, list[CompletionOutput]()
        self._account.expect(prompts)
        window = max(min(WINDOW, service.largest_request), 1)
        try:
            with service.acquire(min(len(prompts), window)) as slot:
                service.check_prompts(prompts)
                for start in range(0, len(prompts), window):
                    given = submission(prompts[start : start + window])
                    stream = service.submit(slot, [given], [None])
                    outputs = await stream.collect()
                    service.engine.cancel(stream)  # the slot forgets it with the next
                    for output in outputs:
                        found.append(msgspec.structs.replace(output, index=len(found)))
                        self._account.note(found[-1], 1)
                    try:
                        check_complete(outputs)
                    except UsageError:
                        service.ready()  # or the server is ending
                        raise
        finally:
            self._account.close(self.id)
        return found

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
    run = _Run(service, "embd", body)
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
    pairs = cast(list[tuple[str, str]], _pairs(body))
    run = _Run(service, "score", body)
    scores = await _scores(service, run, pairs, body.instruction, body.use_activation)
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


async def score_labels(service: Service, body: ScoreRequest, labels: Sequence[int]) -> Response:
    """Answer ``body``, which asks for the probabilities of the tokens ``labels`` after its texts.

    Raises: UsageError, ModelNotFound, Busy.
    """
    service.check_model(body.model)
    pairs = cast(list[tuple[str, str]], _pairs(body))  # or two lists of tokens each
    check_characters(sum(len(query) + len(item) for query, item in pairs), len(pairs))
    joined = join_pairs(pairs, item_first=bool(body.item_first))
    run = _Run(service, "score", body)
    log_request(joined, NO_TEXT, service.settings)
    prompts = await tokenize_prompts(service, joined)
    outputs = await run.label_outputs(prompts, labels)
    softmax = bool(body.apply_softmax)
    return json_reply(
        LabelScores(
            id=run.id,
            object="scoring",
            model=body.model or service.settings.name,
            scores=[label_scores(output, apply_softmax=softmax) for output in outputs],
            usage=run.usage(),
        )
    )


def _pairs(body: ScoreRequest) -> list[tuple[PromptOrTokens, PromptOrTokens]]:
    """Return the pairs that ``body`` names. Raises: UsageError."""
    sides: list[list[PromptOrTokens]] = []
    for names in SIDES:
        given = [getattr(body, name) for name in names if getattr(body, name) is not None]
        if len(given) != 1:
            message = f"give one of {', '.join(f'`{name}`' for name in names)}"
            raise UsageError("E_PROMPT", message, hint="text_1 and text_2 are vLLM's names")
        sides.append(as_prompts(given[0]))
    return make_pairs(*sides)


async def rerank(service: Service, body: RerankRequest, *, repeat: bool) -> Response:
    """Answer ``body``. Raises: UsageError, ModelNotFound, Busy.

    Args:
        service: the served model.
        body: the request.
        repeat: whether documents are in the reply to a request that does not say it.
    """
    service.check_model(body.model)
    texts = [one if isinstance(one, str) else one.text for one in body.documents]
    run = _Run(service, "rerank", body)
    pairs = [(body.query, text) for text in texts]
    scores = await _scores(service, run, pairs, body.instruction, body.use_activation)
    shows = repeat if body.return_documents is None else body.return_documents
    return json_reply(
        Ranking(
            id=run.id,
            model=body.model or service.settings.name,
            results=[
                RankedDocument(index, scores[index], RankedText(texts[index]) if shows else UNSET)
                for index in rank(scores, body.top_n)
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
    if service.info.encoding is not None and service.info.encoding.task == "embed":
        return await _cosines(service, run, pairs, instruction)
    prompts = await service.pairs.tokenize(pairs, instruction)
    vectors = await run.vectors(prompts, activate=use_activation is not False)
    return [float(vector[0]) for vector in vectors]


async def _cosines(
    service: Service, run: _Run, pairs: Sequence[tuple[str, str]], instruction: str | None
) -> list[float]:
    if instruction:
        raise instruction_not_shown()
    prompts = await service.vocabulary.encode(distinct_texts(pairs))
    return cosines(pairs, await run.vectors(prompts))
