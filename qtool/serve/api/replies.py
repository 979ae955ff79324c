"""What replies are made of: log probabilities as OpenAI shows them, counts of tokens, and what is
written down of each request.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from typing import Any

from qtool.engine.sampling_params import SamplingParams
from qtool.serve.backend.engine_client import Ending, Logprob, Piece
from qtool.serve.metrics import Metrics
from qtool.serve.prompts.vocabulary import Offsets, Vocabulary
from qtool.serve.settings import ServeSettings

LOG = logging.getLogger("qtool.serve")
LEAST_LOGPROB = -9999.0  # JSON has no infinity


def chat_logprobs(piece: Piece, vocabulary: Vocabulary) -> dict[str, Any]:
    """Return the log probabilities of ``piece`` as chats have them."""
    content = []
    for position, (logprob, token, _) in enumerate(piece.logprobs):
        top = piece.top[position] if position < len(piece.top) else []
        content.append(
            _told(logprob, token, vocabulary)
            | {"top_logprobs": [_told(value, other, vocabulary) for value, other, _ in top]}
        )
    return {"content": content, "refusal": None}


def _told(logprob: float | None, token: int, vocabulary: Vocabulary) -> dict[str, Any]:
    return {
        "token": vocabulary.text_of(token),
        "logprob": finite(logprob),
        "bytes": list(vocabulary.bytes_of(token)),
    }


def finite(logprob: float | None) -> float | None:
    """Return ``logprob`` as JSON can hold it."""
    return None if logprob is None else max(logprob, LEAST_LOGPROB)


def completion_logprobs(
    logprobs: Sequence[Logprob],
    top: Sequence[Sequence[Logprob] | None],
    vocabulary: Vocabulary,
    offsets: Sequence[int],
) -> dict[str, Any]:
    """Return log probabilities as completions have them; the most likely tokens always have the
    chosen one among them.
    """
    name = vocabulary.label_of
    best = [
        None
        if others is None
        # of one name the likeliest stays
        else {name(token): finite(value) for value, token, _ in reversed((*others, chosen))}
        for chosen, others in zip(logprobs, top, strict=True)
    ]
    values = [finite(value) for value, *_ in logprobs]
    return {
        "tokens": [name(token) for _, token, _ in logprobs],
        "token_logprobs": values,
        "top_logprobs": best,
        "text_offset": list(offsets),
    }


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


def without_answer(piece: Piece) -> Piece:
    """Return ``piece`` as it is told when no token is wanted, though the engine makes one."""
    ending = piece.ending
    if ending is not None and ending.reason["type"] != "abort":
        ending = ending._replace(reason={"type": "length", "length": 0})
    return Piece(piece.choice, "", [], [], [], ending)


def finish_reason(ending: Ending) -> str:
    """Return why a choice ended, in OpenAI's words; ``abort`` when the server or somebody else
    ended it.
    """
    return str(ending.reason["type"])


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    """Return OpenAI's count of tokens."""
    total = prompt_tokens + completion_tokens
    details = {"cached_tokens": cached_tokens}
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": total,
        "prompt_tokens_details": details,
    }


class Account:
    """What one request used, and how long it took: for its usage, the metrics and the log."""

    def __init__(self, kind: str, metrics: Metrics, *, streamed: bool) -> None:
        self._kind, self._metrics, self._streamed = kind, metrics, streamed
        self._began = time.monotonic()
        self._last: dict[int, float] = {}
        self._tokens: dict[int, int] = {}
        self._prompts: dict[
            int, tuple[int, int]
        ] = {}  # by prompt: its tokens, and those found in the cache
        self._reasons: dict[int, str] = {}

    def note(self, piece: Piece, choices_each: int) -> None:
        """Count ``piece``; a prompt counts once, however many choices it has."""
        now = time.monotonic()
        count = len(piece.tokens)
        if count:
            last = self._last.get(piece.choice)
            if self._streamed and last is None:
                self._metrics.first_token(now - self._began)
            elif self._streamed and last is not None and last < now:
                self._metrics.tokens(count, now - last)
            self._last[piece.choice] = now
            self._tokens[piece.choice] = self._tokens.get(piece.choice, 0) + count
        if piece.ending is not None:
            ending = piece.ending
            prompt, number = divmod(piece.choice, choices_each)
            if (
                number == 0
                # what it found in the cache: the others may have found it there because of the
                # first
            ):
                self._prompts[prompt] = (ending.prompt_tokens, ending.cached_tokens)
            self._reasons[piece.choice] = reason = finish_reason(ending)
            if not self._streamed and ending.first_token_s is not None:
                self._metrics.first_token(ending.first_token_s)
            self._metrics.ended(
                reason,
                0 if number else ending.prompt_tokens,
                self._tokens.get(piece.choice, 0),
                now - self._began,
            )

    def usage(self) -> dict[str, Any]:
        """Return OpenAI's count of tokens of the whole request."""
        prompts = self._prompts.values()
        return usage(
            sum(size for size, _ in prompts),
            sum(self._tokens.values()),
            sum(cached for _, cached in prompts),
        )

    def close(self, request_id: str) -> None:
        """Count what was left before its end, and write the line of the log: no text."""
        seconds = time.monotonic() - self._began
        for choice in self._tokens.keys() - self._reasons.keys():
            self._metrics.ended("abort", 0, self._tokens[choice], seconds)
        used = self.usage()
        LOG.info(
            "%s %s: %d prompt tokens (%d cached), %d generated, %.2f s, %s",
            self._kind,
            request_id,
            used["prompt_tokens"],
            used["prompt_tokens_details"]["cached_tokens"],
            used["completion_tokens"],
            seconds,
            "+".join(sorted(set(self._reasons.values()))) or "unanswered",
        )


def log_request(prompts: object, params: SamplingParams, settings: ServeSettings) -> None:
    """Write what is asked for to the log, if the server is to show it."""
    if settings.log_requests:
        LOG.info("request: %s, %s", json.dumps(prompts, ensure_ascii=False), params)
