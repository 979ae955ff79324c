"""What the parsers share whose calls stand after markers: content up to a marker, text up to one,
and arguments that are written as text.
"""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Callable, Mapping

from qtool.serve.api.tools.argument_types import parse_argument
from qtool.serve.api.tools.call_reader import CallReader, Reading

_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)


class MarkedReader(CallReader):
    """Reads content, and calls after any of ``starts``.

    The first character of a marker does not occur in it again.
    """

    starts: tuple[str, ...]

    def __init__(self) -> None:
        firsts = re.escape("".join({start[0] for start in self.starts}))
        self._no_marker = re.compile(f"[^{firsts}]+")
        self._marker = re.compile(f"[{firsts}]")
        self._passed: tuple[str, ...] = ()
        """Markers after calls, which are dropped."""
        super().__init__()

    @abstractmethod
    def _take_after(self, marker: str) -> Reading[bool]:
        """Take what follows ``marker``; return whether it is a call. What is held then is
        content.
        """

    def _read(self) -> Reading[None]:
        while char := (yield from self._rest()):
            if not self._marker.match(char):
                self._take(self._no_marker)
                self._give_content()
                continue
            marker = yield from self._take_marker(*self.starts, *self._passed)
            if marker in self._passed:
                self._held.clear()
            elif marker:
                yield from self._take_after(marker)
            self._give_content()

    def _take_until(self, give: Callable[[str], object], *markers: str) -> Reading[str]:
        """Take text up to one of ``markers``, which share their first character, in pieces; return
        the marker, or an empty text where there is none.
        """
        first = re.escape(markers[0][0])
        others, end = re.compile(f"[^{first}]+"), re.compile(first)
        while char := (yield from self._peek_run(end, give)):
            if char != markers[0][0]:
                give(self._take(others))
                continue
            held = len(self._held)
            if marker := (yield from self._take_marker(*markers)):
                return marker
            give("".join(self._held[held:]))
        return ""

    def _take_text(self, *markers: str) -> Reading[str | None]:
        """Take text and the one of ``markers`` that ends it; return the text without white space
        around it, None where there is no marker.
        """
        pieces: list[str] = []
        marker = yield from self._take_until(pieces.append, *markers)
        return "".join(pieces).strip() if marker else None

    def _open_call(self, name: str, call_id: str | None = None) -> None:
        """Begin a call whose marker and name are held."""
        self._begin_call(name, call_id)
        self._held.clear()

    def _take_json_after(self, name: str, call_id: str | None = None) -> Reading[bool]:
        """Take arguments in JSON, and return them as a call of ``name``; False without any."""
        yield from self._take_space()
        if not name or (yield from self._peek()) not in ("{", "["):
            return False
        self._open_call(name, call_id)
        yield from self._take_value(self._give_arguments)
        return True


class TypedArguments:
    """Makes JSON of the arguments of one call that a model writes one by one, as text.

    Args:
        schemas: of the arguments, by name.
        give: takes the pieces of JSON.
        wrapped: whether a line break stands before and after each value.
    """

    def __init__(
        self,
        schemas: Mapping[str, object],
        give: Callable[[str], object],
        *,
        wrapped: bool = False,
    ) -> None:
        self._wrapped = wrapped
        self._schemas = schemas
        self._give = give
        self._count = 0
        self._held: list[str] = []
        self._is_text = False
        self._began = False

    def begin(self, name: str, *, is_text: bool) -> None:
        """Begin the argument ``name``; one that ``is_text`` is given out as it comes."""
        self._give(f"{', ' if self._count else '{'}{dumps(name)}: ")
        self._count += 1
        self._name = name
        self._is_text = is_text
        self._began = False
        self._held = []
        if is_text:
            self._give('"')

    def push(self, text: str) -> None:
        """Add a piece of the value."""
        if not self._is_text:
            self._held.append(text)
            return
        solid = text
        if self._wrapped and text:
            if not self._began:
                text = text.removeprefix("\n")
            self._began = True
            text = "".join((*self._held, text))
            solid = text.removesuffix("\n")
            self._held = [text[len(solid) :]]
        if solid:
            self._give(dumps(solid)[1:-1])

    def end(self) -> None:
        """End the argument."""
        if self._is_text:
            self._give('"')
        else:
            text = "".join(self._held).strip()
            self._give(dumps(parse_argument(text, self._schemas.get(self._name))))

    def cut(self) -> None:
        """Give out what there is of an argument that breaks off."""
        text = "".join(self._held)
        self._give(dumps(text)[1:-1] if self._is_text else text)

    def close(self) -> None:
        """End the arguments."""
        self._give("}" if self._count else "{}")


def dumps(value: object) -> str:
    """Return ``value`` as JSON in UTF-8; only halves of surrogate pairs are escaped.

    Raises: ValueError, for what JSON cannot hold.
    """
    text = _ENCODER.encode(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, allow_nan=False)
    return text
