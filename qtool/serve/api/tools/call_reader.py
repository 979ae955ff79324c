"""What the parsers of tool calls share: reading JSON from pieces of text, each character once."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Generator
from dataclasses import dataclass
from typing import TypeVar

from qtool.serve.api.tools.deltas import CallDelta, Delta, join_calls, new_call_id

_T = TypeVar("_T")
Reading = Generator[None, None, _T]
"""A generator that yields when it needs more text, and returns what it read."""

NO_MARKER = re.compile(r"[^<]+")
REST = re.compile(r".+", re.DOTALL)
_SPACE = re.compile(r"[ \t\r\n]+")
_ANY_CHARACTER = re.compile(r".", re.DOTALL)
_IN_STRING = re.compile(r'[^"\\]+')
# a quote that is not escaped, or a backslash whose character is in the next piece
_STRING_END = re.compile(r'(?<!\\)(?:\\\\)*(?:"|\\\Z)')
_IN_VALUE = re.compile(r'[^"{}\[\]<]+')
_SCALAR = re.compile(r'[^\s",:{}\[\]<]+')
_ARGUMENTS = ("arguments", "parameters")
# of a call without a marker; Llama also writes "type": "function"
_KEYS = ("name", *_ARGUMENTS, "type")


@dataclass(slots=True)
class _PartialCall:
    """What was read of a call so far."""

    name: str | None = None
    arguments: list[str] | None = None
    """The arguments that came before the name; empty once they are returned as they come."""


class CallReader(ABC):
    """Reads text in pieces with a generator, `_read`, that waits where a piece ends; text is held
    until it is known to be content or a call.

    Each character is read once: quotes and brackets of JSON are followed, and nothing is parsed
    again with the next piece.
    """

    name_key = "name"
    """The key of a call's name, in JSON."""

    _marker = re.compile("<")
    """Finds the first character of a marker."""

    def __init__(self) -> None:
        self._piece = ""
        self._at = 0  # position in the piece
        self._ended = False
        self._held: list[str] = []  # read, and not yet known to be content or a call
        self._space: list[str] = []  # white space of content, dropped if only calls follow
        self._content: list[str] = []
        self._deltas: list[CallDelta] = []
        self._calls = 0
        self._has_content = False
        self._rests = False
        """Whether the reader stands in content, and nothing is held: text without the first
        character of a marker is content, too.
        """
        self._run: tuple[re.Pattern[str], Callable[[str], Delta]] | None = None
        """While characters of one kind are read: what ends them, and the delta of a piece."""
        self._reading = self._read()
        next(self._reading)

    @abstractmethod
    def _read(self) -> Reading[None]:
        """Read the whole answer."""

    @property
    def called(self) -> bool:
        """Whether a call was found."""
        return self._calls > 0

    def push(self, text: str) -> Delta:
        """Take the next piece of text; what may begin a call or a marker is held back."""
        if self._rests and self._is_plain(text):
            self._has_content = True
            return Delta(text)
        if self._run is not None and text and self._run[0].search(text) is None:
            return self._run[1](text)
        self._piece = text
        self._at = 0
        next(self._reading)
        return self._take_delta()

    def finish(self) -> Delta:
        """End the text, and return what was held back."""
        self._piece = ""
        self._at = 0
        self._ended = True
        for _ in self._reading:
            pass
        if not self._calls:
            self._content += self._space
            self._space.clear()
        return self._take_delta()

    def _is_plain(self, text: str) -> bool:
        """Whether ``text`` is content as it is, without a marker or white space to hold back."""
        return (
            not self._space
            and (self._has_content or not self._calls)
            and self._marker.search(text) is None
            and bool(text)
            and not text[-1].isspace()
        )

    def _rest(self) -> Reading[str]:
        """Return the next character, like `_peek`, where content is read."""
        self._rests = True
        char = yield from self._peek()
        self._rests = False
        return char

    def _take_delta(self) -> Delta:
        delta = Delta("".join(self._content), join_calls(self._deltas))
        self._content.clear()
        self._deltas.clear()
        return delta

    def _peek_run(self, end: re.Pattern[str], give: Callable[[str], object]) -> Reading[str]:
        """Return the next character, like `_peek`, where ``give`` takes all before ``end``."""
        if self._at == len(self._piece) and not self._ended:
            self._run = end, self._delta_of(give)
            char = yield from self._peek()
            self._run = None
            return char
        return (yield from self._peek())

    def _delta_of(self, give: Callable[[str], object]) -> Callable[[str], Delta]:
        """Return a function from a whole piece of text, which ``give`` takes, to its delta."""
        if give == self._give_arguments:  # as they come: nothing is held
            index = self._calls - 1
            return lambda text: Delta("", (CallDelta(index, None, None, text),))

        def push(text: str) -> Delta:
            self._held.append(text)
            give(text)
            return self._take_delta()

        return push

    # What is held becomes content, part of a call, or nothing

    def _give_content(self) -> None:
        text = "".join(self._held)
        self._held.clear()
        solid = text.rstrip()
        if solid:
            whole = "".join((*self._space, solid))
            self._content.append(whole if self._has_content or not self._calls else whole.lstrip())
            self._space.clear()
            self._has_content = True
        if text[len(solid) :]:
            self._space.append(text[len(solid) :])

    def _begin_call(self, name: str, call_id: str | None = None) -> None:
        """Return a call: its id, which is made if the model wrote none, and its name."""
        self._deltas.append(CallDelta(self._calls, call_id or self._new_id(), name, ""))
        self._calls += 1

    def _new_id(self) -> str:
        return new_call_id()

    def _give_arguments(self, text: str) -> None:
        self._held.clear()
        self._deltas.append(CallDelta(self._calls - 1, None, None, text))

    # Reading

    def _peek(self) -> Reading[str]:
        """Return the next character, empty at the end of the text."""
        while self._at == len(self._piece):
            if self._ended:
                return ""
            yield
        return self._piece[self._at]

    def _take(self, pattern: re.Pattern[str] = _ANY_CHARACTER) -> str:
        """Take and hold what matches here in the piece; the match may go on in the next piece."""
        match = pattern.match(self._piece, self._at)
        text = match.group() if match else ""
        self._at += len(text)
        self._held.append(text)
        return text

    def _take_space(self) -> Reading[None]:
        while (char := (yield from self._peek())) and char in " \t\r\n":
            self._take(_SPACE)

    def _take_char(self, wanted: str) -> Reading[bool]:
        """Take white space and then ``wanted``, if it is the next character."""
        yield from self._take_space()
        found = (yield from self._peek()) == wanted
        if found:
            self._take()
        return found

    def _take_marker(self, *markers: str) -> Reading[str]:
        """Take and return the marker that stands here, or return an empty text; what it shares with
        a marker is held.

        Only the first character of a marker is ``<``.
        """
        seen = ""
        while char := (yield from self._peek()):
            if not any(marker.startswith(seen + char) for marker in markers):
                return ""
            seen += self._take()
            if seen in markers:
                return seen
        return ""

    def _take_string(self, give: Callable[[str], object]) -> Reading[bool]:
        """Take the JSON string that begins here, in pieces; return False if it does not end."""
        give(self._take())
        while char := (yield from self._peek_run(_STRING_END, give)):
            if char == '"':
                give(self._take())
                return True
            if char == "\\":
                give(self._take())
                if (yield from self._peek()):
                    give(self._take())
            else:
                give(self._take(_IN_STRING))
        return False

    def _take_name(self) -> Reading[str | None]:
        """Take white space and a JSON string, and return it decoded; None if there is none, or it
        is not valid text.
        """
        yield from self._take_space()
        raw: list[str] = []
        if (yield from self._peek()) != '"' or not (yield from self._take_string(raw.append)):
            return None
        try:
            name: str = json.loads("".join(raw))
            name.encode()  # fails for a lone surrogate
        except ValueError:
            return None
        return name

    def _take_value(self, give: Callable[[str], object]) -> Reading[bool]:
        """Take the JSON value that begins here, in pieces; return False if it breaks off.

        A ``<`` outside of strings ends it: that is a marker.
        """
        depth = 0
        while (char := (yield from self._peek())) and char != "<":
            if char == '"':
                if not (yield from self._take_string(give)):
                    return False
            elif char in "{[":
                depth += 1
                give(self._take())
            elif not depth:
                return (yield from self._take_scalar(give))
            elif char in "}]":
                depth -= 1
                give(self._take())
            else:
                give(self._take(_IN_VALUE))
            if not depth:
                return True
        return False

    def _take_scalar(self, give: Callable[[str], object]) -> Reading[bool]:
        found = False
        while (yield from self._peek()) and (text := self._take(_SCALAR)):
            give(text)
            found = True
        return found

    def _take_calls(self, known: Collection[str] | None = None) -> Reading[bool]:
        """Take an array of JSON objects of names and arguments, and return them; return whether
        there is one at least. ``known`` is as in `_take_call`.
        """
        calls = self._calls
        more = yield from self._take_char("[")
        while more and (yield from self._take_call(known)):
            more = yield from self._take_char(",")
            if not more:
                yield from self._take_char("]")
            self._held.clear()
        return self._calls > calls

    def _take_call(self, known: Collection[str] | None = None) -> Reading[bool]:
        """Take a JSON object of a name and arguments, in any order. Return True if it, or what
        there is of it, was returned as a call.

        Args:
            known: the only names that make it a call, which then has no keys but a call's own. None
                after a marker: other keys are skipped, and arguments may be missing.
        """
        call = _PartialCall()
        more = yield from self._take_char("{")
        while more and (yield from self._take_member(call, known)):
            more = yield from self._take_char(",")
            if not more and (yield from self._take_char("}")) and known is None:
                self._default_arguments(call)
        return call.name is not None and call.arguments is not None

    def _take_member(self, call: _PartialCall, known: Collection[str] | None) -> Reading[bool]:
        """Take a key and its value into ``call``; return False if it is not one of a call."""
        key = yield from self._take_name()
        if key is None or (known is not None and key not in _KEYS):
            return False
        if not (yield from self._take_char(":")):
            return False
        yield from self._take_space()
        if key == self.name_key and call.name is None:
            return (yield from self._take_call_name(call, known))
        if key in _ARGUMENTS and call.arguments is None:
            return (yield from self._take_arguments(call))
        return (yield from self._take_value(_ignore))

    def _take_call_name(self, call: _PartialCall, known: Collection[str] | None) -> Reading[bool]:
        name = yield from self._take_name()
        if not name or (known is not None and name not in known):
            return False
        call.name = name
        if call.arguments is not None:
            self._begin_call(name)
            self._give_arguments("".join(call.arguments))
        return True

    def _take_arguments(self, call: _PartialCall) -> Reading[bool]:
        first = yield from self._peek()
        if not first or first in "<,:}]":
            return False
        call.arguments = []
        if call.name is None:
            return (yield from self._take_value(call.arguments.append))
        self._begin_call(call.name)
        return (yield from self._take_value(self._give_arguments))

    def _default_arguments(self, call: _PartialCall) -> None:
        """Let a call without arguments have an empty object of them."""
        if call.name and call.arguments is None:
            call.arguments = []
            self._begin_call(call.name)
            self._give_arguments("{}")


def _ignore(text: str) -> None:
    """Ignore a piece of a value; it stays held."""
