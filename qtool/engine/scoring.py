"""`Engine.score` and `Engine.rerank`: they compute what the server's routes of these names do."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Generic, TypedDict, TypeVar, cast

from jinja2 import TemplateError

from qtool.checkpoint.encoding import Encoding
from qtool.engine.encoding import EncodeRequest, encode_requests
from qtool.engine.outputs import CompletionOutput
from qtool.engine.prompts import PromptTokenizer, not_unicode
from qtool.engine.requests import GenerateRequest, Request, RequestParser
from qtool.engine.scores import (
    LABEL_PARAMS,
    PairForm,
    check_complete,
    cosines,
    distinct_texts,
    ignored_option_reason,
    instruction_not_shown,
    join_pairs,
    label_scores,
    make_pairs,
    rank,
)
from qtool.engine.vectors import vector_of
from qtool.errors import UsageError, one_line
from qtool.options import arguments_of

Texts = str | Sequence[str]
Prompts = Texts | Sequence[int] | Sequence[Sequence[int]]
Scores = list[float] | list[list[float]]
A = TypeVar("A")
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Ranked(TypedDict):
    """One document that `Engine.rerank` returns."""

    index: int
    """Which of the documents."""
    relevance_score: float


@dataclass(frozen=True, kw_only=True)
class PairOptions:
    """The options of scores by rerankers and embedding models."""

    instruction: str | None = None
    """What makes a document relevant, in place of the checkpoint's own, for chat templates that
    show it."""
    use_activation: bool = True
    """False: logits of a reranker, without a sigmoid."""


@dataclass(frozen=True)
class ScoreArguments(PairOptions):
    """The arguments of `Engine.score`; the positional ones are SGLang's."""

    query: Prompts
    """One text for all items, or one for each; with ``label_token_ids`` it may be tokens."""
    items: Prompts
    """The documents to score; tokens where the query is."""
    label_token_ids: Sequence[int] | None = None
    """Tokens whose probabilities are the scores."""
    apply_softmax: bool = False
    """Let the probabilities of the labels sum to 1."""
    item_first: bool = False
    """Put the item before the query."""


@dataclass(frozen=True)
class RerankArguments(PairOptions):
    """The arguments of `Engine.rerank`."""

    query: str
    documents: Sequence[str]
    top_n: int | None = field(default=None, kw_only=True)
    """How many are returned; None: all."""


@dataclass(frozen=True)
class _Job(Generic[T_co]):
    """The requests to run, and the result to make of their outputs."""

    requests: list[Request]
    result: Callable[[list[CompletionOutput]], T_co]
    """Takes one output for each request, in their order."""


class ScoringMethods(ABC):
    """The methods of `Engine` that score texts: by a reranker, by an embedding model or by the
    probabilities of labels.
    """

    tokenizer: PromptTokenizer | None
    encoding: Encoding | None
    _parser: RequestParser

    @abstractmethod
    def _outputs(self, requests: Sequence[Request]) -> Generator[CompletionOutput, None, None]: ...

    @abstractmethod
    def _async_outputs(
        self, requests: Sequence[Request]
    ) -> AsyncGenerator[CompletionOutput, None]: ...

    @arguments_of(ScoreArguments)
    def score(self, *arguments: Any, **options: Any) -> Scores:
        """Score items for a query; the arguments are the fields of `ScoreArguments`.

        Returns: for each item a number; with ``label_token_ids`` a list of the probabilities of
            these tokens after query and item.
        Raises: UsageError; CheckpointRefused, for a reranker whose prompts are unknown.
        """
        return self._run(self._score_job(ScoreArguments(*arguments, **options)))

    @arguments_of(ScoreArguments)
    async def async_score(self, *arguments: Any, **options: Any) -> Scores:
        """Do as `score`. Cancelling it aborts the requests."""
        return await self._async_run(self._score_job, ScoreArguments(*arguments, **options))

    @arguments_of(RerankArguments)
    def rerank(self, *arguments: Any, **options: Any) -> list[Ranked]:
        """Return the documents that are most relevant for a query, the best first; the arguments
        are the fields of `RerankArguments`.

        Raises: as `score`.
        """
        return self._run(self._rank_job(RerankArguments(*arguments, **options)))

    @arguments_of(RerankArguments)
    async def async_rerank(self, *arguments: Any, **options: Any) -> list[Ranked]:
        """Do as `rerank`. Cancelling it aborts the requests."""
        return await self._async_run(self._rank_job, RerankArguments(*arguments, **options))

    def _run(self, job: _Job[T]) -> T:
        outputs = sorted(self._outputs(job.requests), key=attrgetter("index"))
        check_complete(outputs)
        return job.result(outputs)

    async def _async_run(self, make_job: Callable[[A], _Job[T]], arguments: A) -> T:
        job = await asyncio.get_running_loop().run_in_executor(None, make_job, arguments)
        outputs = [output async for output in self._async_outputs(job.requests)]
        outputs.sort(key=attrgetter("index"))
        check_complete(outputs)
        return job.result(outputs)

    def _score_job(self, given: ScoreArguments) -> _Job[Scores]:
        problem = ignored_option_reason(given)
        if problem is not None:
            raise UsageError("E_PROMPT", problem, hint="leave it out")
        if given.label_token_ids is None:
            return self._pair_job(make_pairs(_texts(given.query), _texts(given.items)), given)
        labels = _as_list(given.label_token_ids)
        if labels == []:
            raise UsageError("E_PROMPT", "label_token_ids is empty", hint="give one label at least")
        joined = _joined_prompts(given)
        is_text = isinstance(joined[0], str)
        requests, _ = self._parser.parse(
            GenerateRequest(
                prompt=joined if is_text else None,
                input_ids=None if is_text else cast(list[list[int]], joined),
                sampling_params=LABEL_PARAMS,
                return_logprob=True,
                label_token_ids=labels,
            )
        )
        softmax = given.apply_softmax
        return _Job(
            requests,
            lambda outputs: [label_scores(each, apply_softmax=softmax) for each in outputs],
        )

    def _pair_job(
        self, pairs: Sequence[tuple[str, str]], options: PairOptions
    ) -> _Job[list[float]]:
        encoding = self.encoding
        instruction = options.instruction
        if instruction is not None:
            _check_text("the instruction", instruction)
        if encoding is None:
            raise UsageError(
                "E_TASK",
                "the model generates text: it scores documents only by label_token_ids",
                hint="give the tokens whose probabilities are the scores, or load a reranker",
            )
        if encoding.task == "embed":
            if instruction:
                raise instruction_not_shown()
            texts = EncodeRequest(prompt=distinct_texts(pairs))
        else:
            texts = EncodeRequest(input_ids=self._pair_tokens(pairs, instruction))
        requests, _ = encode_requests(self._parser, texts)

        def result(outputs: list[CompletionOutput]) -> list[float]:
            vectors = [
                vector_of(encoding, output.vector, activate=options.use_activation)
                for output in outputs
            ]
            if encoding.task == "embed":
                return cosines(pairs, vectors)
            return [float(vector[0]) for vector in vectors]

        return _Job(requests, result)

    def _pair_tokens(
        self, pairs: Sequence[tuple[str, str]], instruction: str | None
    ) -> list[list[int]]:
        """Return the prompts of a reranker, in tokens. Raises: UsageError, CheckpointRefused."""
        tokenizer = self.tokenizer
        if tokenizer is None:
            message = "scores need a tokenizer, and skip_tokenizer_init left it out"
            raise UsageError("E_PROMPT", message, hint="`encode` takes input_ids")
        template = tokenizer.chat_template
        if isinstance(template, Mapping):
            template = template.get("default")
        form = PairForm.of(self.encoding, template)
        form.check(instruction)
        backend = tokenizer.backend_tokenizer
        if not form.has_template:
            return [encoded.ids for encoded in backend.encode_batch_fast(list(pairs))]
        try:
            prompts = tokenizer.apply_chat_template(
                form.conversations(pairs, instruction),
                tokenize=False,
                add_generation_prompt=True,
                **form.variables(instruction),
            )
        except TemplateError as error:
            message = f"the chat template refuses query and document: {one_line(error)}"
            hint = "give `tokenizer.chat_template` of the engine one that shows both"
            raise UsageError("E_CHAT_TEMPLATE_REFUSED", message, hint=hint) from error
        form.check_shown(instruction, prompts[0])
        return [
            encoded.ids for encoded in backend.encode_batch_fast(prompts, add_special_tokens=False)
        ]

    def _rank_job(self, given: RerankArguments) -> _Job[list[Ranked]]:
        _check_text("the query", given.query)
        top_n = given.top_n
        if top_n is not None and (type(top_n) is not int or top_n < 0):
            message = f"top_n is `{top_n}`"
            raise UsageError("E_PROMPT", message, hint="a whole number, or None for all documents")
        scored = self._pair_job(make_pairs([given.query], _texts(given.documents)), given)

        def result(outputs: list[CompletionOutput]) -> list[Ranked]:
            scores = scored.result(outputs)
            return [
                {"index": index, "relevance_score": scores[index]} for index in rank(scores, top_n)
            ]

        return _Job(scored.requests, result)


def _as_list(given: object) -> Any:
    """Return an array of NumPy or torch as a list, and anything else as it is."""
    return given.tolist() if hasattr(given, "tolist") else given


def _joined_prompts(given: ScoreArguments) -> list[str]:
    """Return the text of each query and item, or a list of tokens for each. Raises: UsageError."""
    pairs = make_pairs(_prompts(given.query), _prompts(given.items))
    if any(type(query) is not type(item) for query, item in pairs):
        message = "one of query and items is text, and the other tokens"
        raise UsageError("E_PROMPT", message, hint="give both as text, or both as tokens")
    return join_pairs(cast(list[tuple[str, str]], pairs), item_first=given.item_first)


def _prompts(given: Prompts) -> list[str] | list[list[int]]:
    """Return ``given`` as a list of texts, or of lists of tokens. Raises: UsageError."""
    prompts = _as_list(given)
    if not isinstance(prompts, (list, tuple)) or not prompts or isinstance(prompts[0], str):
        return [*_texts(given)]
    return [list(_as_list(one)) for one in ([prompts] if type(prompts[0]) is int else prompts)]


def _texts(given: Prompts) -> Sequence[str]:
    """Return the texts in ``given``. Raises: UsageError."""
    texts = [given] if isinstance(given, str) else _as_list(given)
    if not isinstance(texts, (list, tuple)):
        message = f"the texts to score are a {type(given).__name__}"
        raise UsageError("E_PROMPT", message, hint="give a text, or a list")
    if not texts:
        raise UsageError("E_PROMPT", "there is no text to score", hint="give a text, or a list")
    for text in texts:
        _check_text("a text to score", text)
    return texts


def _check_text(name: str, given: object) -> None:
    """Raise UsageError if ``given`` is not a text; ``name`` is what the message calls it."""
    if not isinstance(given, str):
        message = f"{name} is a {type(given).__name__}"
        raise UsageError("E_PROMPT", message, hint="query, documents and instruction are texts")
    try:
        given.encode()
    except UnicodeError as error:
        raise not_unicode() from error
