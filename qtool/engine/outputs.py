"""`CompletionOutput`: what the engine's loop emits for one completion, increment by increment.

The same type reaches the callers of `Engine` and, through the server's socket, the HTTP replies.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NotRequired, TypeAlias, TypedDict

from msgspec import Struct


class FinishReason(TypedDict):
    """Why a completion ended, as SGLang reports it."""

    type: Literal["stop", "length", "abort"]
    matched: NotRequired[int | str]
    """Of "stop": the token or string that ended the text; absent where a grammar is complete."""
    length: NotRequired[int]
    """Of "length": the tokens generated."""
    message: NotRequired[str]
    """Of "abort"."""


class TokenLogprob(Struct, array_like=True, frozen=True, gc=False):
    """The log probability of one token, and of the most likely ones in its place."""

    logprob: float | None
    """Natural logarithm; None for the first token of a prompt."""
    token_id: int
    top: tuple[tuple[float, int], ...] | None
    """(log probability, token) of the most likely; None for the first token of a prompt."""
    labels: tuple[float, ...] = ()
    """Log probabilities of `GenerateRequest.label_token_ids` in its place."""


class SpecCounts(Struct, array_like=True):
    """What came of drafted tokens."""

    steps: int = 0
    """Steps that decoded a sequence, each of them counted once."""
    drafts: int = 0
    """Of these, with drafted tokens."""
    proposed: int = 0
    """Tokens drafted."""
    correct: int = 0
    """Of these, accepted."""

    def note(self, proposed: int, correct: int) -> None:
        """Count a step of one sequence."""
        self.steps += 1
        self.drafts += proposed > 0
        self.proposed += proposed
        self.correct += correct

    @property
    def accept_length(self) -> float:
        """Return the mean tokens of a step; 1.0 is what decoding gives without drafts."""
        return 1 + self.correct / max(self.steps, 1)

    @property
    def accept_rate(self) -> float:
        """Return the share of drafted tokens that were accepted."""
        return self.correct / max(self.proposed, 1)

    def facts(self) -> dict[str, int | float]:
        """Return the numbers under the names of SGLang's ``meta_info``."""
        return {
            "spec_verify_ct": self.steps,
            "spec_accept_length": self.accept_length,
            "spec_accept_rate": self.accept_rate,
            "spec_num_proposed_drafts": self.proposed,
            "spec_num_correct_drafts": self.correct,
        }


class FinishInfo(Struct, array_like=True, frozen=True):
    """What is known of a completion once it is complete."""

    reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    """Tokens of the prompt that were found in the prefix cache."""
    first_token_s: float | None
    """Seconds from the request's arrival to its first token; None if there is none."""
    latency_s: float
    """Seconds from the request's arrival to its end."""
    queue_s: float | None = None
    """Seconds from the request's arrival to its first step; None if there is none."""
    spec: SpecCounts | None = None
    """None where no tokens are drafted."""


class CompletionOutput(Struct, array_like=True):
    """What a completion has gained since its last output: all of it, if it is not streamed."""

    index: int
    """Which completion of the request: prompt number times n, plus the number of the choice."""
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob]
    """One for each of ``token_ids``; empty if none were requested."""
    finish: FinishInfo | None = None
    """Set in the last output of a completion."""
    prompt_logprobs: list[TokenLogprob] = []
    """Of the prompt's tokens, in the first output of a completion, if they were requested."""
    reasoning_tokens: int = 0
    """How many tokens of thoughts came to be known as such."""
    vector: bytes = b""
    """Of a prompt that was encoded, for `encoding.vector_of`: float32, little-endian."""


@dataclass(frozen=True)
class CompletionError:
    """The error that ended a completion, in place of its last output."""

    index: int
    error: Exception


Output: TypeAlias = CompletionOutput | CompletionError


def merge(outputs: Sequence[CompletionOutput]) -> CompletionOutput:
    """Return consecutive ``outputs`` of one completion as a single one."""
    if len(outputs) == 1:
        return outputs[0]
    chain = itertools.chain.from_iterable
    return CompletionOutput(
        index=outputs[0].index,
        text="".join([output.text for output in outputs]),
        token_ids=list(chain(output.token_ids for output in outputs)),
        logprobs=list(chain(output.logprobs for output in outputs)),
        finish=outputs[-1].finish,
        prompt_logprobs=list(chain(output.prompt_logprobs for output in outputs)),
        reasoning_tokens=sum(output.reasoning_tokens for output in outputs),
        vector=outputs[-1].vector,
    )


def merge_by_index(outputs: Iterable[CompletionOutput]) -> list[CompletionOutput]:
    """Return ``outputs`` with those of each completion merged, in the order of their first."""
    groups: dict[int, list[CompletionOutput]] = {}
    for output in outputs:
        groups.setdefault(output.index, []).append(output)
    return [merge(group) for group in groups.values()]
