"""Where the thoughts before an answer end in its text."""

from __future__ import annotations

from collections.abc import Sequence


class Thoughts:
    """Finds where the thoughts in a text end, which comes in pieces.

    Args:
        start: the marker that begins thoughts, after white space at most; None if the text begins
            inside of them.
        ends: the marker that ends them; of several, each follows the one before.
        calls: markers of tool calls: what follows is counted neither as thoughts nor as answer.
    """

    def __init__(self, start: str | None, ends: Sequence[str], calls: Sequence[str] = ()) -> None:
        self._calls = calls
        self._called = False
        self._tail_size = max(map(len, (*ends, *calls))) - 1
        self._start = start
        self._ends = list(ends)
        self._held = ""
        """What may be the beginning of the start marker."""
        self._tail = ""
        """The end of the thoughts, which may be the beginning of a marker."""
        self._began = start is None
        self.over = False
        """Whether the answer has begun."""
        self.rest = ""
        """What the piece that ended the thoughts had after them."""
        self._tokens = 0

    @property
    def tokens(self) -> int:
        """The tokens counted so far that belong to thoughts, markers included."""
        return self._tokens if self._began else 0

    def count_token(self) -> None:
        """Count a token before the pieces of text that it completes."""
        if not (self.over or self._called):
            self._tokens += 1

    def push(self, text: str) -> tuple[str, str]:
        """Return the next piece in two parts: thoughts with their markers, and the answer."""
        if self.over:
            return "", text
        if not self._began:
            text = self._held + text
            self._held = ""
            solid = text.lstrip()
            assert self._start is not None
            if len(solid) < len(self._start) and self._start.startswith(solid):
                self._held = text
                return "", ""
            if not solid.startswith(self._start):
                self.over = True
                return "", text
            self._began = True
        return self._inside(text)

    def flush(self) -> tuple[str, str]:
        """End the text; return what was held back, as `push` does."""
        held = self._held
        self._held = ""
        return "", held

    def _inside(self, text: str) -> tuple[str, str]:
        whole = self._tail + text
        at = 0
        while self._ends and (found := whole.find(self._ends[0], at)) >= 0:
            at = found + len(self._ends.pop(0))
        if self._ends:
            self._called = self._called or any(call in whole for call in self._calls)
            self._tail = whole[max(at, len(whole) - self._tail_size) :] if self._tail_size else ""
            return text, ""
        self.over = True
        self.rest = whole[at:]
        return text[: len(text) - len(self.rest)], self.rest
