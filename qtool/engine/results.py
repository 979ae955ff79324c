"""The dictionaries that SGLang's ``Engine.generate`` returns, made of completion outputs."""

from __future__ import annotations

from typing import NotRequired, TypedDict

from qtool.engine.outputs import CompletionOutput, FinishInfo, TokenLogprob
from qtool.engine.requests import Request

# SGLang: the natural logarithm, the token, and its text, which is left out
SglangLogprob = tuple[float | None, int, None]


class Result(TypedDict):
    """What `Engine.generate` returns for one completion."""

    text: str
    output_ids: list[int]
    meta_info: dict[str, object]
    index: NotRequired[int]
    """Which of several completions, where they are streamed."""


class CompletionResult:
    """Adds up the outputs of one request.

    Args:
        request: whose outputs are added.
        with_index: whether the dictionaries have an ``index``.
    """

    def __init__(self, request: Request, *, with_index: bool = False) -> None:
        self._request = request
        self._with_index = with_index
        self._text = ""
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._finish: FinishInfo | None = None

    def add(self, output: CompletionOutput) -> None:
        """Add the next output."""
        self._text += output.text
        self._token_ids += output.token_ids
        self._logprobs += output.logprobs
        self._finish = output.finish

    def to_dict(self) -> Result:
        """Return all there is so far."""
        result: Result = {
            "text": self._text,
            "output_ids": list(self._token_ids),
            "meta_info": self._meta_info(),
        }
        if self._with_index:
            result["index"] = self._request.index
        return result

    def _meta_info(self) -> dict[str, object]:
        request = self._request
        finish = self._finish
        meta: dict[str, object] = {
            "id": request.id,
            "finish_reason": None if finish is None else finish.reason,
            "prompt_tokens": len(request.sequence.prompt),
            "completion_tokens": len(self._token_ids),
            "cached_tokens": request.sequence.cached_tokens,
        }
        if request.top_logprobs is not None:
            meta["input_token_logprobs"] = _chosen(request.prompt_logprobs)
            meta["output_token_logprobs"] = _chosen(self._logprobs)
        if request.top_logprobs:
            meta["input_top_logprobs"] = _most_likely(request.prompt_logprobs)
            meta["output_top_logprobs"] = _most_likely(self._logprobs)
        if finish is not None and finish.spec is not None:
            meta |= finish.spec.facts()
        if finish is not None:
            meta["e2e_latency"] = finish.latency_s
        return meta


def _chosen(logprobs: list[TokenLogprob]) -> list[SglangLogprob]:
    return [(one.logprob, one.token_id, None) for one in logprobs]


def _most_likely(logprobs: list[TokenLogprob]) -> list[list[SglangLogprob] | None]:
    return [
        None if one.top is None else [(value, token_id, None) for value, token_id in one.top]
        for one in logprobs
    ]
