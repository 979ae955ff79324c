"""Drafted tokens: what followed the last tokens of a request where they came before in its prompt
or output (n-gram speculation, prompt lookup), or what the model's own layer drafted (`engine.mtp`).

A step computes the last token and the drafted ones; the tokens sampled after each of them are those
that decoding would give, one by one, as long as the drafts are these tokens.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from qtool.engine.config import Speculation
from qtool.engine.outputs import SpecCounts

LOG = logging.getLogger("qtool.engine")
LOG_INTERVAL_S = 10.0
MAX_MATCHES = 4096  # of one token, the latest, where longer matches are looked for


class Drafter(Protocol):
    """Drafts the tokens of one request."""

    def propose(self, tokens: Sequence[int], room: int) -> Sequence[int]:
        """Return at most ``room`` tokens that may follow ``tokens``, prompt and outputs so far."""


class MtpDrafts:
    """The tokens that the model's own layer drafted for one request in the step read last."""

    def __init__(self) -> None:
        self._drafts: Sequence[int] = ()
        self._length = 0

    def keep(self, drafts: Sequence[int], length: int) -> None:
        """Keep what may follow the first ``length`` tokens of the request; from a negative number
        on nothing was drafted.
        """
        self._drafts = list(itertools.takewhile(lambda token: token >= 0, drafts))
        self._length = length

    def propose(self, tokens: Sequence[int], room: int) -> Sequence[int]:
        """Return at most ``room`` tokens that may follow ``tokens``."""
        return self._drafts[:room] if len(tokens) == self._length else ()


class NgramDrafter:
    """Drafts the tokens of one request.

    Args:
        speculation: how many, and how long a match must be.
        prompt_ids: the prompt.
    """

    def __init__(self, speculation: Speculation, prompt_ids: Sequence[int]) -> None:
        self._speculation = speculation
        self._size = 0
        self._ids: NDArray[np.int32] = np.empty(len(prompt_ids) + 256, np.int32)
        self._extend(prompt_ids)

    def propose(self, tokens: Sequence[int], room: int) -> list[int]:
        """Return at most ``room`` tokens that may follow ``tokens``, which begin with all that were
        given before; none when their end has not come before.

        The longest match counts, and of several the last. Where fewer tokens follow it than are
        wanted, they are a period, which goes on.
        """
        self._extend(tokens[self._size :])
        end = self._match()
        if end is None:
            return []
        count = min(room, self._speculation.drafts)
        following = self._ids[end + 1 : min(end + 1 + count, self._size)]
        drafts: list[int] = np.resize(following, count).tolist()
        return drafts

    def _extend(self, tokens: Sequence[int]) -> None:
        size = self._size + len(tokens)
        if size > len(self._ids):
            self._ids = np.concatenate([self._ids[: self._size], np.empty(size, np.int32)])
        self._ids[self._size : size] = tokens
        self._size = size

    def _match(self) -> int | None:
        """Return where the longest known end of the tokens came last before, the index of its last
        token; None where it is too short.
        """
        ids = self._ids
        last = self._size - 1
        matches = (ids[:last] == ids[last]).nonzero()[0][-MAX_MATCHES:]
        length = best = 0
        while len(matches) and length < self._speculation.max_window:
            length += 1
            best = int(matches[-1])
            matches = matches[matches >= length]
            matches = matches[ids[matches - length] == ids[last - length]]
        return best if length >= self._speculation.min_window else None


class SpecMeter:
    """Counts what came of all drafts, and logs it."""

    def __init__(self) -> None:
        self.total = SpecCounts()
        self._since = SpecCounts()
        self._logged = time.monotonic()

    def note(self, proposed: int, correct: int) -> None:
        """Count a step of one sequence."""
        self.total.note(proposed, correct)
        self._since.note(proposed, correct)

    def log(self, *, at_once: bool = False) -> None:
        """Log the steps since the last time, every `LOG_INTERVAL_S` or now."""
        now = time.monotonic()
        if not self._since.steps or not (at_once or now - self._logged >= LOG_INTERVAL_S):
            return
        counts = self._since
        LOG.info(
            "speculation: accept length %.2f, %d of %d drafted tokens accepted",
            counts.accept_length,
            counts.correct,
            counts.proposed,
        )
        self._since = SpecCounts()
        self._logged = now
