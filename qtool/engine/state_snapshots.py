"""The prefix cache of layers that keep a state for each sequence: copies of states, by the pages of
tokens that made them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from qtool.engine.attention.pages import PAGE

MIN_SPARED_TOKENS = 4 * PAGE
"""A snapshot that spares fewer tokens is not made: it cuts the prompt into two parts."""


class StateSnapshots:
    """``count`` copies of states, of which the least recently used make room.

    A copy is restored before the pass of a step and saved after it, so a step never finds what it
    saves itself.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._unused = list(range(count - 1, -1, -1))
        self._kept: OrderedDict[bytes, int] = OrderedDict()  # least recently used first
        self._fresh: dict[bytes, int] = {}  # of the step that is made

    def begin_step(self) -> None:
        """Let what the step before saved be found."""
        self._kept.update(self._fresh)
        self._fresh.clear()

    def longest(self, digests: Sequence[bytes]) -> tuple[int, int | None]:
        """Return how many pages a sequence of ``digests`` can start with, and which copy to
        restore; None: it starts anew.
        """
        for count in range(len(digests), 0, -1):
            if (index := self._kept.get(digests[count - 1])) is not None:
                self._kept.move_to_end(digests[count - 1])
                return count, index
        return 0, None

    def save(self, digest: bytes) -> int | None:
        """Return where the state after the page ``digest`` is kept; None when it already is, or
        there is no room in this step.
        """
        if digest in self._kept or digest in self._fresh:
            return None
        if self._unused:
            index = self._unused.pop()
        elif self._kept:
            _, index = self._kept.popitem(last=False)
        else:
            return None
        self._fresh[digest] = index
        return index

    def forget(self, digests: Iterable[bytes]) -> None:
        """Let nobody find the states after these pages."""
        for digest in digests:
            for known in (self._kept, self._fresh):
                if (index := known.pop(digest, None)) is not None:
                    self._unused.append(index)

    def forget_all(self) -> None:
        """Let nobody find what is kept now."""
        self.forget([*self._kept, *self._fresh])


def boundaries(size: int, matched: int, restored: int) -> list[int]:
    """Return after how many tokens the states of a prompt of ``size`` tokens are worth a copy, the
    fewest first: where it parts from an earlier prompt, and at its last whole page.

    Args:
        matched: tokens whose pages are in the cache.
        restored: tokens that need not be computed.
    """
    wanted = {matched, (size - 1) // PAGE * PAGE}
    return sorted(each for each in wanted if each - restored >= MIN_SPARED_TOKENS)
