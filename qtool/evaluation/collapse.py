"""Whether greedy answers fall into loops or end at once, where the reference's do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MAX_PERIOD = 64  # tokens
REPEATS = 4
MIN_LOOP = 48  # tokens that repeat
SUDDEN = 8  # an answer that ends within so many tokens
LONG = 64  # while the reference's has so many


@dataclass(frozen=True)
class Collapse:
    """An answer that collapsed, where the other model's did not."""

    kind: str
    """``loop`` or ``sudden end``."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    """The answer."""

    of_reference: bool
    """Whether it is the reference's."""


def loops(answer: Sequence[int]) -> bool:
    """Return whether ``answer`` ends in a piece of up to `MAX_PERIOD` tokens that repeats."""
    for period in range(1, MAX_PERIOD + 1):
        size = max(MIN_LOOP, REPEATS * period)
        tail = answer[-size:]
        if len(tail) == size and tail[period:] == tail[:-period]:
            return True
    return False


def compare_answers(
    prompts: Sequence[Sequence[int]],
    reference: Sequence[Sequence[int]],
    quantized: Sequence[Sequence[int]],
) -> list[Collapse]:
    """Return the answers of either model that collapse where the other's do not.

    Args:
        prompts: token ids.
        reference: the reference's answers.
        quantized: the answers to the same prompts.
    """
    found = []
    for prompt, theirs, ours in zip(prompts, reference, quantized, strict=True):
        for answer, other in ((ours, theirs), (theirs, ours)):
            if kind := _kind(answer, other):
                found.append(Collapse(kind, tuple(prompt), tuple(answer), answer is theirs))
    return found


def net_share(collapsed: Sequence[Collapse], answers: int) -> float:
    """Return how many more of ``answers`` collapsed than the reference's did, as a share."""
    net = sum(-1 if each.of_reference else 1 for each in collapsed)
    return max(0, net) / answers


def _kind(answer: Sequence[int], other: Sequence[int]) -> str:
    if loops(answer) and not loops(other):
        return "loop"
    return "sudden end" if len(answer) <= SUDDEN and len(other) >= LONG else ""
