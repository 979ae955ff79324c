"""Separates thoughts between two markers from the answer that follows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from qtool.serve.api.tools.deltas import Delta

State = Literal["undecided", "open", "closed"]
"""Where an answer begins: before the start marker, if there will be one; inside of thoughts; or
after them.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Markers:
    """What stands around the thoughts of a model."""

    start: str
    end: str
    calls: tuple[str, ...] = ()
    """Markers of tool calls that end thoughts, too, where tools may be called."""

    implicit: bool = False
    """Whether an answer begins inside of thoughts, even if the prompt does not show it."""

    in_messages: bool = False
    """Whether an answer consists of messages in harmony's format."""

    special: tuple[str, ...] = ()
    """Further markers of answers that may be special tokens."""

    answer: tuple[str, ...] = ()
    """Markers that begin the answer one after the other, where that is not ``end``."""

    @property
    def engine_ends(self) -> tuple[str, ...]:
        """The markers after which grammars and stop strings hold the text."""
        return self.answer or (self.end,)


class ThoughtReader:
    """Separates the text of one answer, in pieces, into thoughts and what follows them.

    Each character is read once, and those that may belong to a marker are held back.

    Args:
        markers: around the thoughts.
        state: where the text begins.
        may_call: whether the markers of calls end thoughts.
    """

    def __init__(self, markers: Markers, state: State, *, may_call: bool = False) -> None:
        self._start = markers.start
        self._end = markers.end
        self._ends = (markers.end, *(markers.calls if may_call else ()))
        self._first = re.compile("|".join({re.escape(end[0]) for end in self._ends}))
        self._opened = state == "open" or (state == "undecided" and markers.implicit)
        self._state: Literal["before", "inside", "after", "closed"]
        self._state = "closed" if state == "closed" else "before"
        self._held = ""
        """White space and the beginning of a marker."""
        self._space: list[str] = []
        """White space that is dropped if no more thoughts follow."""
        self._began = False
        """Whether there are thoughts that are not white space."""

    def push(self, text: str) -> Delta:
        """Return what became certain with the next piece of text; what follows the thoughts is
        content.
        """
        if self._state == "closed":
            return Delta(text)
        if self._is_plain(text):
            return Delta("", (), text)
        thoughts, answer = self._push(text)
        return Delta(answer, (), thoughts)

    def finish(self) -> Delta:
        """End the text, and return what was held back."""
        thoughts, answer = self._finish()
        return Delta(answer, (), thoughts)

    def _is_plain(self, text: str) -> bool:
        """Whether ``text`` is thoughts as it is, without a marker or white space to hold back."""
        return (
            self._began
            and self._state == "inside"
            and not self._held
            and not self._space
            and self._first.search(text) is None
            and bool(text)
            and not text[-1].isspace()
        )

    def _push(self, text: str) -> tuple[str, str]:
        text = self._held + text
        self._held = ""
        if self._state == "before":
            solid = text.lstrip()
            self._space.append(text[: len(text) - len(solid)])
            if len(solid) < len(self._start) and self._start.startswith(solid):
                self._held = solid
                return "", ""
            text = self._skip_start(solid)
        if self._state == "inside":
            return self._inside(text)
        return "", self._after(text)

    def _finish(self) -> tuple[str, str]:
        held = self._held
        self._held = ""
        if self._state == "before" and not self._opened:
            return "", "".join((*self._space, held))
        if self._state in ("before", "inside"):
            return self._thoughts(held), ""
        return "", ""

    def _skip_start(self, solid: str) -> str:
        """Return the text after the start marker, if it has one, and go on to the next state."""
        self._state = "inside"
        if solid.startswith(self._start):
            return solid[len(self._start) :]
        if not self._opened:
            self._state = "closed"
            solid = "".join((*self._space, solid))
        return solid

    def _inside(self, text: str) -> tuple[str, str]:
        found = [(at, end) for end in self._ends if (at := text.find(end)) >= 0]
        if not found:
            kept = len(text) - held_length(text, self._ends)
            self._held = text[kept:]
            return self._thoughts(text[:kept]), ""
        at, end = min(found)
        thoughts = self._thoughts(text[:at])
        self._state = "after"
        rest = text[at + len(end) :] if end == self._end else text[at:]
        return thoughts, self._after(rest)

    def _thoughts(self, text: str) -> str:
        """Return ``text`` without white space at the beginning and the end of all thoughts."""
        solid = text.rstrip()
        if not solid:
            self._space.append(text)
            return ""
        whole = "".join((*self._space, solid))
        self._space = [text[len(solid) :]] if len(solid) < len(text) else []
        if not self._began:
            self._began = True
            whole = whole.lstrip()
        return whole

    def _after(self, text: str) -> str:
        """Return ``text`` without the white space that follows the end marker."""
        if self._state == "after":
            text = text.lstrip()
            self._state = "closed" if text else "after"
        return text


def held_length(text: str, markers: Sequence[str]) -> int:
    """Return how many characters at the end of ``text`` may be the beginning of a marker."""
    longest = max(map(len, markers)) - 1
    tail = text[-longest:] if longest else ""
    return max((len(tail) - at for at in _beginnings(tail, markers)), default=0)


def _beginnings(tail: str, markers: Iterable[str]) -> Iterable[int]:
    for marker in markers:
        at = tail.find(marker[0])
        while at >= 0 and not marker.startswith(tail[at:]):
            at = tail.find(marker[0], at + 1)
        if at >= 0:
            yield at
