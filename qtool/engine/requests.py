"""Requests: what a caller asks for (`GenerateRequest`), and each completion that the loop computes
for it (`Request`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import TypeAlias, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from qtool.checkpoint.encoding import Encoding
from qtool.engine.answer_constraint import AnswerConstraint
from qtool.engine.config import Speculation
from qtool.engine.detokenizer import TextStream
from qtool.engine.grammar import Compiler, Constraint
from qtool.engine.outputs import (
    CompletionOutput,
    FinishInfo,
    FinishReason,
    Output,
    SpecCounts,
    TokenLogprob,
)
from qtool.engine.prompts import PromptReader, PromptTokenizer, names_of
from qtool.engine.sampling_batch import History
from qtool.engine.sampling_params import MAX_TOP_LOGPROBS, SamplingParams
from qtool.engine.speculation import Drafter, MtpDrafts, NgramDrafter
from qtool.engine.step import SequenceState
from qtool.errors import UsageError

CONTEXT_TOKENS = 8  # tokens of the prompt that the text continues

T = TypeVar("T")
SamplingFields: TypeAlias = Mapping[str, object] | SamplingParams
Deliver: TypeAlias = Callable[[Output], object]


@dataclass(frozen=True)
class GenerateRequest:
    """The arguments of `Engine.generate`, under SGLang's names.

    Raises: UsageError E_LOGPROBS.
    """

    prompt: str | Sequence[str] | None = None
    sampling_params: SamplingFields | Sequence[SamplingFields] | None = None
    """For all prompts, or one for each."""
    input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None
    """Tokens in place of ``prompt``."""
    stream: bool = False
    return_logprob: bool | Sequence[bool] | None = False
    """Return natural logarithms of the model's probabilities, before temperature and penalties;
    like the next two for all prompts, or one for each."""
    logprob_start_len: int | Sequence[int] | None = -1
    """The first token of the prompt whose log probability is returned; -1 returns none."""
    top_logprobs_num: int | Sequence[int] | None = 0
    """How many of the most likely tokens are returned for each token."""
    rid: str | Sequence[str] | None = None
    """Names of the requests, one for each prompt, for `Engine.abort`."""
    label_token_ids: Sequence[int] = ()
    """With ``return_logprob``: tokens whose log probabilities are returned for each generated
    token."""
    cache_salt: str = ""
    """Only requests with the same one find each other's prompts in the prefix cache."""

    def __post_init__(self) -> None:
        given = self.top_logprobs_num
        for top in given if isinstance(given, (list, tuple)) else [given or 0]:
            if not isinstance(top, int) or not 0 <= top <= MAX_TOP_LOGPROBS:
                message = f"top_logprobs_num is {top}"
                raise UsageError("E_LOGPROBS", message, hint=f"0 to {MAX_TOP_LOGPROBS}")


@dataclass(frozen=True)
class LogprobOptions:
    """Which log probabilities of one prompt's completions are returned."""

    top: int | None
    """Alternatives for each token; None: no log probabilities."""
    first: int
    """The first token of the prompt; -1: none."""
    labels: Sequence[int] = ()
    """Tokens whose log probabilities are returned for each generated token."""

    @classmethod
    def of_each(cls, given: GenerateRequest, count: int) -> list[LogprobOptions]:
        """Return those of each of ``count`` prompts. Raises: UsageError, for lists of other
        lengths.
        """
        wanted = _for_each("return_logprob", given.return_logprob or False, count)
        tops = _for_each("top_logprobs_num", given.top_logprobs_num or 0, count)
        start = -1 if given.logprob_start_len is None else given.logprob_start_len
        firsts = _for_each("logprob_start_len", start, count)
        return [
            cls(top, first, given.label_token_ids) if want else cls(None, -1)
            for want, top, first in zip(wanted, tops, firsts, strict=True)
        ]


def _for_each(name: str, value: T | Sequence[T], count: int) -> Sequence[T]:
    """Return ``value`` for each of ``count`` prompts."""
    if not isinstance(value, (list, tuple)):
        return [cast(T, value)] * count
    if len(value) != count:
        message = f"{count} prompts and {len(value)} values of {name}"
        raise UsageError("E_PROMPT", message, hint="give one for all, or one for each prompt")
    return value


def _deliver_nothing(output: Output) -> None:
    pass


@dataclass(eq=False, kw_only=True)
class Request:
    """One completion that the loop computes."""

    id: str
    group: str
    """The rid of the call it belongs to."""
    index: int
    """Its number among the completions of the call."""
    sequence: SequenceState
    params: SamplingParams
    seed: int
    text: TextStream
    stream: bool
    """Whether each token is delivered when it comes, and not all of them at the end."""
    history: History | None
    """The tokens that penalties count."""
    constraint: Constraint | AnswerConstraint | None
    """The grammar of the text."""
    top_logprobs: int | None
    """Alternatives for each token; None: no log probabilities."""
    prompt_logprobs_from: int | None
    """The first token of the prompt whose log probability is returned."""
    labels: Sequence[int] = ()
    """Tokens whose log probabilities are returned for each generated token."""
    drafter: Drafter | None = None
    """Drafts tokens that may come next."""
    masks: Sequence[NDArray[np.int32] | None] = ()
    """What the grammar lets come now and after each token drafted last."""
    spec: SpecCounts | None = None
    """What came of drafts; None without a drafter."""
    deliver: Deliver = _deliver_nothing
    """Takes outputs and errors, in the loop's thread."""
    done: bool = False
    began: float = field(default_factory=time.monotonic)
    queue_s: float | None = None
    """Seconds from its start until its first step was launched."""
    first_token_s: float | None = None
    """Seconds from its start until its first token was read."""
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    new_logprobs: list[TokenLogprob] = field(default_factory=list)
    """Of the tokens that were not delivered yet."""
    delivered: int = 0
    """Tokens that were delivered."""
    prompt_delivered: bool = False
    """Whether ``prompt_logprobs`` were."""
    delivered_thoughts: int = 0
    """Of these, tokens of thoughts."""
    vector: bytes = b""
    """What a prompt was encoded to."""

    def __post_init__(self) -> None:
        if self.prompt_logprobs_from is not None:  # nothing predicts the first token
            first = self.sequence.prompt[self.prompt_logprobs_from]
            self.prompt_logprobs.append(TokenLogprob(None, first, None))

    @property
    def next_prompt_position(self) -> int:
        """The token of the prompt whose log probability comes next."""
        return (self.prompt_logprobs_from or 0) + len(self.prompt_logprobs)

    def take_output(self, reason: FinishReason | None = None) -> CompletionOutput:
        """Return what was not delivered yet; ``reason``: why the completion ends with it."""
        sequence = self.sequence
        size = len(sequence.prompt)
        token_ids = [] if sequence.is_encoded else sequence.tokens[size + self.delivered :]
        self.delivered += len(token_ids)
        logprobs = self.new_logprobs
        self.new_logprobs = []
        prompt_logprobs = [] if self.prompt_delivered else self.prompt_logprobs
        self.prompt_delivered = True
        text = self.text.take() if reason is None else self.text.finish(reason)
        output = CompletionOutput(
            index=self.index,
            text=text,
            token_ids=token_ids,
            logprobs=logprobs,
            finish=None if reason is None else self._finish_info(reason),
            prompt_logprobs=prompt_logprobs,
            vector=self.vector,
        )
        if self.text.thoughts is not None:
            output.reasoning_tokens = self.text.thoughts.tokens - self.delivered_thoughts
            self.delivered_thoughts += output.reasoning_tokens
        return output

    def _finish_info(self, reason: FinishReason) -> FinishInfo:
        return FinishInfo(
            reason=reason,
            prompt_tokens=len(self.sequence.prompt),
            cached_tokens=self.sequence.cached_tokens,
            first_token_s=self.first_token_s,
            latency_s=time.monotonic() - self.began,
            queue_s=self.queue_s,
            spec=self.spec,
        )

    def advance(self, token: int) -> FinishReason | None:
        """Add ``token``; return why the completion ends with it, or None.

        Raises: UsageError, when nothing can follow it in the grammar.
        """
        if self.first_token_s is None:
            self.first_token_s = time.monotonic() - self.began
        if self.history is not None:
            self.history.append(token)
        reason = self.text.push(token)  # first: it says where thoughts end
        complete = self.constraint is not None and self.constraint.accept(token)
        if complete and (reason is None or reason["type"] == "length"):
            return {"type": "stop"}
        return reason

    def drop(self, count: int) -> None:
        """Forget the last ``count`` tokens, which came after the end."""
        size = len(self.sequence.tokens) - count
        del self.sequence.tokens[size:]
        if self.top_logprobs is not None:
            del self.new_logprobs[len(self.new_logprobs) - count :]


@dataclass(frozen=True, kw_only=True)
class RequestParser:
    """Checks what callers ask for, and makes the loop's requests of it."""

    tokenizer: PromptTokenizer | None
    compiler: Compiler | None
    """Of grammars; None without a tokenizer."""
    eos_ids: tuple[int, ...]
    vocab_size: int
    context_length: int
    cache_tokens: int
    """Tokens that the KV cache holds."""
    use_prefix: bool
    """Whether requests share the pages of common prefixes."""
    seeds: Random | None
    """Gives seeds to requests without one; None: each is random."""
    speculation: Speculation | None
    """How tokens are drafted; None: they are not."""
    encoding: Encoding | None = None
    """What the model returns for a prompt; None: it continues it."""

    @property
    def prompts(self) -> PromptReader:
        """What turns prompts into tokens."""
        return PromptReader(self.tokenizer, self.vocab_size)

    def parse(self, given: GenerateRequest) -> tuple[list[Request], bool]:
        """Return the requests for ``given``, and whether its result is a single one, not a list.

        Raises: UsageError.
        """
        if self.encoding is not None:
            raise UsageError("E_TASK", "the model generates no text", hint="`encode` encodes one")
        prompts, single = self.prompts.read(given.prompt, given.input_ids)
        count = len(prompts)
        all_params = self._sampling_params(given.sampling_params, count)
        names = names_of(given.rid, count)
        if not len(all_params) == len(names) == count:
            message = f"{count} prompts, {len(all_params)} sampling_params, {len(names)} ids"
            raise UsageError("E_PROMPT", message, hint="give one for all, or one for each prompt")
        self.prompts.check_token_ids(given.label_token_ids)
        logprobs = LogprobOptions.of_each(given, count)
        requests: list[Request] = []
        for tokens, params, name, options in zip(prompts, all_params, names, logprobs, strict=True):
            for number in range(params.n):
                request = self._request(
                    given, tokens, params, options, name, number, index=len(requests)
                )
                requests.append(request)
        return requests, single and all_params[0].n == 1

    def _request(
        self,
        given: GenerateRequest,
        tokens: list[int],
        params: SamplingParams,
        logprobs: LogprobOptions,
        name: str,
        number: int,
        *,
        index: int,
    ) -> Request:
        """Return the request for completion ``number`` of the prompt ``tokens``."""
        max_new_tokens = self._max_new_tokens(params, len(tokens))
        wants_prompt = 0 <= logprobs.first < len(tokens)
        sequence = SequenceState(
            tokens,
            max_new_tokens,
            waits_for_tokens=params.waits_for_tokens or self.speculation is not None,
            use_prefix=self.use_prefix and not wants_prompt,
            cache_salt=given.cache_salt,
            needs_logits=wants_prompt,
        )
        text = TextStream(
            None if self.tokenizer is None else self.tokenizer.backend_tokenizer,
            params,
            self.eos_ids,
            max_new_tokens=max_new_tokens,
            context=tokens[-CONTEXT_TOKENS:],
        )
        constraint = Constraint.of(params, self.compiler, text.end_ids)
        drafter: Drafter | None = None
        if self.speculation is not None:
            uses_mtp = self.speculation.mtp
            drafter = MtpDrafts() if uses_mtp else NgramDrafter(self.speculation, tokens)
        return Request(
            id=f"{name}-{number}" if params.n > 1 else name,
            group=name,
            index=index,
            sequence=sequence,
            params=params,
            seed=params.row_seed(number),
            text=text,
            stream=given.stream,
            history=History.of(params, tokens),
            constraint=self._after_thoughts(constraint, text, params),
            top_logprobs=logprobs.top,
            prompt_logprobs_from=logprobs.first if wants_prompt else None,
            labels=logprobs.labels,
            drafter=drafter,
            spec=None if drafter is None else SpecCounts(),
        )

    def _after_thoughts(
        self, constraint: Constraint | None, text: TextStream, params: SamplingParams
    ) -> Constraint | AnswerConstraint | None:
        """Return ``constraint``, of the answer alone where there may be thoughts before it."""
        if constraint is None or text.thoughts is None:
            return constraint
        assert self.tokenizer is not None
        return AnswerConstraint(
            constraint,
            text.thoughts,
            self.tokenizer.backend_tokenizer,
            params.reasoning_start,
            params.reasoning_ends[-1],
        )

    def _max_new_tokens(self, params: SamplingParams, prompt_tokens: int) -> int:
        room = self.context_length - prompt_tokens
        if params.max_new_tokens is not None:
            return max(1, min(params.max_new_tokens, room))
        return max(1, min(room, self.cache_tokens - prompt_tokens + 1))

    def _sampling_params(
        self, given: SamplingFields | Sequence[SamplingFields] | None, count: int
    ) -> list[SamplingParams]:
        """Return the parameters as given, or ``count`` times where one stands for all prompts."""
        if isinstance(given, (list, tuple)):
            return [self._checked_params(fields) for fields in given]
        fields = cast(SamplingFields, given or {})
        return [self._checked_params(fields) for _ in range(count)]

    def _checked_params(self, fields: SamplingFields) -> SamplingParams:
        params = fields if isinstance(fields, SamplingParams) else SamplingParams.from_dict(fields)
        params.check_vocabulary(self.vocab_size)
        if self.tokenizer is None and (params.stop_strings or params.reasoning_ends):
            raise UsageError(
                "E_SAMPLING",
                "stop strings and reasoning_end need a tokenizer, and skip_tokenizer_init left it "
                "out",
                hint="use stop_token_ids",
            )
        if params.sampling_seed is None and self.seeds is not None:
            return replace(params, sampling_seed=self.seeds.getrandbits(63))
        return params
