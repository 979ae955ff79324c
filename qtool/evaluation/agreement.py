"""How far the next-token distributions of two models differ, token by token."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qtool.evaluation.texts import Window

ROWS = 256  # whose distributions are in float32 at a time
CONFIDENT = 0.9  # the reference's probability of its first choice
WORST = 20


@dataclass(frozen=True)
class WorstToken:
    """A position where the two models differ most."""

    kl: float
    """Nats."""

    document: int
    """Index into the documents."""

    position: int
    """Of the token that follows, in its document."""

    reference_token: int
    """The reference's first choice."""

    reference_probability: float
    """What the reference gives it."""

    token: int
    """The quantized model's first choice."""

    probability: float
    """What the quantized model gives it."""


@dataclass
class Agreement:
    """What was measured after each token that counts; N of them, in the order of the windows."""

    documents: list[int] = field(default_factory=list)
    """[N]: index of the document."""

    positions: list[int] = field(default_factory=list)
    """[N]: position in the window."""

    reference_nll: list[float] = field(default_factory=list)
    """[N]: minus the log-probability of the token that follows; nats."""

    nll: list[float] = field(default_factory=list)
    """[N]: the quantized model's."""

    kl: list[float] = field(default_factory=list)
    """[N]: KL(reference || quantized); nats."""

    same_top1: list[bool] = field(default_factory=list)
    """[N]: whether both have the same first choice."""

    confident: list[bool] = field(default_factory=list)
    """[N]: whether the reference gives its first choice `CONFIDENT` or more."""

    worst: list[tuple[float, int, WorstToken]] = field(default_factory=list)
    """The `WORST` positions of the largest KL divergence, as a heap."""

    def add(
        self, windows: Sequence[Window], reference: Tensor, quantized: Tensor, *, is_log: bool
    ) -> None:
        """Compare what two models say after the tokens of ``windows`` that count.

        Args:
            windows: R tokens of theirs count.
            reference: [R, V]; log-probabilities if ``is_log``, else logits.
            quantized: logits [R, V].
            is_log: what ``reference`` is.
        """
        targets = torch.tensor([token for each in windows for token in each.ids[each.first :]])
        self.documents += [each.document for each in windows for _ in range(each.count)]
        self.positions += [index for each in windows for index in range(each.first, len(each.ids))]
        locations = [
            (each.document, each.start + index)
            for each in windows
            for index in range(each.first, len(each.ids))
        ]
        for start in range(0, len(targets), ROWS):
            rows = slice(start, start + ROWS)
            self._add_rows(
                locations[rows],
                targets[rows].to(quantized.device),
                _log_probabilities(reference[rows].to(quantized.device), is_log=is_log),
                _log_probabilities(quantized[rows], is_log=False),
            )

    def _add_rows(
        self,
        locations: Sequence[tuple[int, int]],
        targets: Tensor,
        reference: Tensor,
        quantized: Tensor,
    ) -> None:
        kl = kl_divergence(reference, quantized)
        reference_best = reference.max(-1)
        best = quantized.max(-1)
        self.reference_nll += (-reference.gather(-1, targets[:, None])[:, 0]).tolist()
        self.nll += (-quantized.gather(-1, targets[:, None])[:, 0]).tolist()
        values = kl.tolist()
        before = len(self.kl)
        self.kl += values
        self.same_top1 += (reference_best.indices == best.indices).tolist()
        self.confident += (reference_best.values.exp() >= CONFIDENT).tolist()
        order = sorted(range(len(values)), key=lambda row: _rank(values[row]))[-WORST:]
        for row in order:
            document, position = locations[row]
            worst = WorstToken(
                kl=values[row],
                document=document,
                position=position,
                reference_token=int(reference_best.indices[row]),
                reference_probability=float(reference_best.values[row].exp()),
                token=int(best.indices[row]),
                probability=float(best.values[row].exp()),
            )
            heapq.heappush(self.worst, (_rank(values[row]), -before - row, worst))
            if len(self.worst) > WORST:
                heapq.heappop(self.worst)

    def worst_tokens(self) -> list[WorstToken]:
        """Return the positions that differ most, worst first."""
        return [worst for _, _, worst in sorted(self.worst, reverse=True)]


def kl_divergence(reference: Tensor, quantized: Tensor) -> Tensor:
    """Return KL(reference || quantized) [R] of log-probabilities [R, V], in nats."""
    terms = reference.exp() * (reference - quantized)
    # what the reference rules out adds nothing: 0 * log 0 is 0
    return terms.masked_fill(reference == -torch.inf, 0).sum(-1)


def _rank(kl: float) -> float:
    """Return ``kl``, not-a-number above all."""
    return float("inf") if kl != kl else kl


def _log_probabilities(values: Tensor, *, is_log: bool) -> Tensor:
    return values.float() if is_log else values.float().log_softmax(-1)
