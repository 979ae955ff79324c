"""The parts of replies: log probabilities in OpenAI's shape, counts of tokens, and the log line of
each request.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from typing import Literal, cast

import msgspec
from msgspec import UNSET, UnsetType

from qtool.engine.outputs import CompletionOutput, FinishInfo, SpecCounts, TokenLogprob
from qtool.engine.sampling_params import SamplingParams
from qtool.serve.api import schemas
from qtool.serve.api.protocol import StreamOptions
from qtool.serve.metrics import Metrics
from qtool.serve.prompts.vocabulary import Offsets, Vocabulary
from qtool.serve.settings import ServeSettings

LOG = logging.getLogger("qtool.serve")
MIN_LOGPROB = -9999.0  # JSON has no infinity


def chat_logprobs(output: CompletionOutput, vocabulary: Vocabulary) -> schemas.ChatLogprobs:
    """Return the log probabilities of ``output`` as chats have them."""
    content = []
    for one in output.logprobs:
        logprob = cast(float, one.logprob)  # None only in prompts
        content.append(
            schemas.TokenLogprob(
                token=vocabulary.text_of(one.token_id),
                logprob=max(logprob, MIN_LOGPROB),
                bytes=vocabulary.byte_list_of(one.token_id),
                top_logprobs=[_top_logprob(*likely, vocabulary) for likely in one.top or ()],
            )
        )
    return schemas.ChatLogprobs(content)


def _top_logprob(logprob: float, token: int, vocabulary: Vocabulary) -> schemas.TopLogprob:
    return schemas.TopLogprob(
        token=vocabulary.text_of(token),
        logprob=max(logprob, MIN_LOGPROB),
        bytes=vocabulary.byte_list_of(token),
    )


def finite(logprob: float | None) -> float | None:
    """Return ``logprob`` as JSON can hold it."""
    return None if logprob is None else max(logprob, MIN_LOGPROB)


def completion_logprobs(
    logprobs: Sequence[TokenLogprob], vocabulary: Vocabulary, offsets: Sequence[int]
) -> schemas.CompletionLogprobs:
    """Return log probabilities as completions have them."""
    return schemas.CompletionLogprobs(
        tokens=[vocabulary.label_of(one.token_id) for one in logprobs],
        token_logprobs=[finite(one.logprob) for one in logprobs],
        top_logprobs=[_most_likely(one, vocabulary) for one in logprobs],
        text_offset=list(offsets),
    )


def _most_likely(one: TokenLogprob, vocabulary: Vocabulary) -> dict[str, float | None] | None:
    """Return the most likely tokens and the chosen one by name; of those with the same name, the
    likeliest.
    """
    if one.top is None:
        return None
    pairs = reversed((*one.top, (one.logprob, one.token_id)))
    return {vocabulary.label_of(token): finite(value) for value, token in pairs}


def prompt_offsets(
    tokens: Sequence[int], text: str, vocabulary: Vocabulary
) -> tuple[list[int], Offsets]:
    """Return where the ``tokens`` of a prompt begin in its ``text``, and the place where what
    follows goes on.

    Counted from the end: a tokenizer may have put tokens, or a space, in front that are not in the
    text.
    """
    length = len(b"".join(map(vocabulary.bytes_of, tokens)).decode(errors="replace"))
    offsets = Offsets(vocabulary, len(text) - length)
    return [offsets.add(token) for token in tokens], offsets


def without_text(output: CompletionOutput) -> CompletionOutput:
    """Return ``output`` for a request of no tokens, for which the engine generates one."""
    finish = output.finish
    if finish is not None and finish.reason["type"] != "abort":
        finish = msgspec.structs.replace(finish, reason={"type": "length", "length": 0})
    return msgspec.structs.replace(output, text="", token_ids=[], logprobs=[], finish=finish)


def finish_reason(finish: FinishInfo) -> Literal["stop", "length", "abort"]:
    """Return why a choice ended, in OpenAI's words; ``abort`` if it was aborted."""
    return finish.reason["type"]


class Account:
    """What one request used, and how long it took: for its usage, the metrics and the log."""

    def __init__(self, kind: str, metrics: Metrics, *, streamed: bool) -> None:
        self._kind = kind
        self._metrics = metrics
        self._streamed = streamed
        self._began = time.monotonic()
        self._last: dict[int, float] = {}
        """When each choice last gained a token."""
        self._tokens: dict[int, int] = {}
        self._drafts: list[SpecCounts] = []
        """Of choices that ended."""
        self._prompts: dict[int, tuple[int, int]] = {}
        """By prompt: its tokens, and those found in the cache."""
        self._reasons: dict[int, str] = {}
        self.reasoning_tokens: int | None = None
        """Tokens of thoughts; None where they are not told apart."""

    def expect(self, prompts: Sequence[Sequence[int]]) -> None:
        """Count the tokens of ``prompts`` before the first output."""
        self._prompts = {number: (len(prompt), 0) for number, prompt in enumerate(prompts)}

    def note(self, output: CompletionOutput, choices_each: int) -> None:
        """Count ``output``; a prompt counts once, however many choices it has."""
        now = time.monotonic()
        if output.token_ids:
            self._note_tokens(output.index, len(output.token_ids), now)
        if self.reasoning_tokens is not None:
            self.reasoning_tokens += output.reasoning_tokens
        if output.finish is not None:
            self._note_finish(output.index, output.finish, choices_each, now)

    def _note_tokens(self, index: int, count: int, now: float) -> None:
        last = self._last.get(index)
        if self._streamed and last is None:
            self._metrics.first_token(now - self._began)
        elif self._streamed and last is not None and last < now:
            self._metrics.tokens(count, now - last)
        self._last[index] = now
        self._tokens[index] = self._tokens.get(index, 0) + count

    def _note_finish(self, index: int, finish: FinishInfo, choices_each: int, now: float) -> None:
        prompt, number = divmod(index, choices_each)
        # only the first choice: the others may have found in the cache what it computed
        if number == 0:
            self._prompts[prompt] = (finish.prompt_tokens, finish.cached_tokens)
        if finish.spec is not None:
            self._drafts.append(finish.spec)
        self._reasons[index] = reason = finish_reason(finish)
        if not self._streamed and finish.first_token_s is not None:
            self._metrics.first_token(finish.first_token_s)
        self._metrics.phases(finish, self._tokens.get(index, 0))
        self._metrics.ended(
            reason,
            prompt_tokens=0 if number else finish.prompt_tokens,
            cached_tokens=0 if number else finish.cached_tokens,
            completion_tokens=self._tokens.get(index, 0),
            seconds=now - self._began,
        )

    def usage(self) -> schemas.Usage:
        """Return OpenAI's count of tokens of the whole request."""
        prompt_tokens, generated, cached = self._totals()
        return schemas.Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=generated,
            total_tokens=prompt_tokens + generated,
            prompt_tokens_details=schemas.CachedTokens(cached),
            completion_tokens_details=self._details(),
        )

    def _details(self) -> schemas.CompletionDetails | UnsetType:
        """Return how many tokens were thoughts, and what came of drafted ones, as OpenAI counts
        those of predicted outputs.
        """
        if not self._drafts and self.reasoning_tokens is None:
            return UNSET
        details = schemas.CompletionDetails(self.reasoning_tokens or 0)
        if self._drafts:
            accepted = sum(counts.correct for counts in self._drafts)
            proposed = sum(counts.proposed for counts in self._drafts)
            details.accepted_prediction_tokens = accepted
            details.rejected_prediction_tokens = proposed - accepted
        return details

    def close(self, request_id: str) -> None:
        """Count the choices that did not finish, and log a line without text."""
        seconds = time.monotonic() - self._began
        for index in self._tokens.keys() - self._reasons.keys():
            self._metrics.ended(
                "abort",
                prompt_tokens=0,
                completion_tokens=self._tokens[index],
                seconds=seconds,
            )
        prompt_tokens, generated, cached = self._totals()
        LOG.info(
            "%s %s: %d prompt tokens (%d cached), %d generated, %.2f s, %s",
            self._kind,
            request_id,
            prompt_tokens,
            cached,
            generated,
            seconds,
            "+".join(sorted(set(self._reasons.values()))) or "unanswered",
        )

    def _totals(self) -> tuple[int, int, int]:
        """Return the tokens of the prompts, those generated, and those found in the cache."""
        prompts = self._prompts.values()
        return (
            sum(size for size, _ in prompts),
            sum(self._tokens.values()),
            sum(cached for _, cached in prompts),
        )


class StreamUsage:
    """Which chunks of a stream have the number of tokens, by its ``stream_options``."""

    def __init__(self, options: StreamOptions | None, account: Account) -> None:
        self._account = account
        self.at_end: bool = bool(options and options.include_usage)
        """Whether a last chunk without choices gives the counts."""
        self._in_chunks = self.at_end and bool(options and options.continuous_usage_stats)

    def of_chunk(self) -> schemas.Usage | UnsetType | None:
        """Return the usage in a chunk with choices: the counts so far, null, or no field."""
        if self._in_chunks:
            return self._account.usage()
        return None if self.at_end else UNSET


def log_request(prompts: object, params: SamplingParams, settings: ServeSettings) -> None:
    """Log the prompts and parameters of a request, if --log-requests is set."""
    if settings.log_requests:
        LOG.info("request: %s, %s", json.dumps(prompts, ensure_ascii=False), params)
