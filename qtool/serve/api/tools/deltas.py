"""What parsers of answers return: pieces of reasoning, of content and of calls."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import Protocol

from msgspec import Struct

from qtool.serve.api.schemas import Call, CalledFunction


class CallDelta(Struct, frozen=True, gc=False):
    """A piece of a tool call, as OpenAI streams it."""

    index: int
    """The number of the call in its answer."""

    id: str | None
    """Only in the first piece of a call."""

    name: str | None
    """Only in the first piece of a call."""

    arguments: str


class Delta(Struct, frozen=True, gc=False):
    """What became certain with one more piece of text."""

    content: str = ""
    calls: tuple[CallDelta, ...] = ()
    reasoning: str = ""


class ToolParser(Protocol):
    """Separates the text of one answer into content and calls."""

    def push(self, text: str) -> Delta:
        """Take the next piece of text; what may begin a call or a marker is held back."""

    def finish(self) -> Delta:
        """End the text, and return what was held back."""

    @property
    def called(self) -> bool:
        """Whether a call was found: `finish_reason` is then ``tool_calls``."""


@dataclass(frozen=True, slots=True)
class WholeAnswer:
    """An answer in OpenAI's shape."""

    reasoning: str | None
    content: str | None
    """None if there are only calls or thoughts."""
    calls: list[Call]


def fold(deltas: Iterable[Delta]) -> WholeAnswer:
    """Return the answer that ``deltas`` make."""
    deltas = list(deltas)
    pieces = (call for delta in deltas for call in delta.calls)
    calls = [_make_call(call) for call in join_calls(pieces)]
    reasoning = "".join(delta.reasoning for delta in deltas) or None
    content = "".join(delta.content for delta in deltas)
    has_others = bool(calls) or reasoning is not None
    return WholeAnswer(reasoning, content or (None if has_others else ""), calls)


def _make_call(call: CallDelta) -> Call:
    assert call.id is not None and call.name is not None  # all of its pieces are joined
    return Call(call.id, "function", CalledFunction(call.name, call.arguments))


def join_calls(pieces: Iterable[CallDelta]) -> tuple[CallDelta, ...]:
    """Join neighbouring pieces of the same call."""
    pieces = tuple(pieces)
    if len(pieces) < 2:
        return pieces
    calls = []
    for index, group in groupby(pieces, attrgetter("index")):
        first, *rest = group
        arguments = "".join(piece.arguments for piece in (first, *rest))
        calls.append(CallDelta(index, first.id, first.name, arguments))
    return tuple(calls)


def new_call_id() -> str:
    """Return a random id for a call."""
    return f"call_{secrets.token_hex(12)}"
