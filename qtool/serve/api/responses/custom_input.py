"""The input of custom tools, which is a text and no JSON.

To the model a custom tool is a function with one argument, ``{"input": TEXT}``; clients get TEXT.
"""

from __future__ import annotations

import re

import msgspec

from qtool.serve.api.fields import Json

SCHEMA: Json = {
    "type": "object",
    "properties": {"input": {"type": "string"}},
    "required": ["input"],
    "additionalProperties": False,
}
_HEAD = re.compile(r'\s*\{\s*"input"\s*:\s*"')
_MAX_HEAD = 64  # characters in which the text begins, if the arguments are as they should be
_PIECE = re.compile(
    r'[^"\\]+|'
    r"\\u[dD][89aAbB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|"
    r"\\u(?![dD][89aAbB])[0-9a-fA-F]{4}|"
    r"\\[^u]"
)
_ESCAPE = len(r"\ud83d\ude00")  # the longest
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}


class CustomInput:
    """Reads the text out of arguments that come in pieces; its work is linear in them."""

    def __init__(self) -> None:
        self._held: list[str] = []
        """The arguments so far, while the text has not begun."""
        self._length = 0
        """Of these."""
        self._tail: str | None = None
        """What is not decoded yet of the text; None before it begins."""
        self._ended = False

    def push(self, arguments: str) -> str:
        """Return the text that became certain with more ``arguments``."""
        if self._tail is not None:
            return self._decode(self._tail + arguments)
        may_begin = self._length <= _MAX_HEAD
        self._held.append(arguments)
        self._length += len(arguments)
        so_far = "".join(self._held) if may_begin else ""
        head = _HEAD.match(so_far)
        return "" if head is None else self._decode(so_far[head.end() :])

    def finish(self) -> str:
        """End the arguments, and return what was held back: the only text in them, or else all of
        them.
        """
        if self._tail is not None:
            return "" if self._ended else self._tail.partition('"')[0]
        arguments = "".join(self._held)
        try:
            value = msgspec.json.decode(arguments)
        except (ValueError, RecursionError):
            return arguments
        if isinstance(value, dict) and len(value) == 1:
            [value] = value.values()
        return value if isinstance(value, str) else arguments

    def _decode(self, text: str) -> str:
        """Return what of ``text`` is whole, and keep the rest."""
        if self._ended:
            return ""
        pieces = []
        at = 0
        while at < len(text) and text[at] != '"':
            if piece := _PIECE.match(text, at):
                pieces.append(_unescape(piece[0]))
                at = piece.end()
            elif len(text) - at >= _ESCAPE:  # JSON has no such escape
                pieces.append(text[at])
                at += 1
            else:
                break
        self._tail = text[at:]
        self._ended = self._tail[:1] == '"'
        return "".join(pieces)


def _unescape(piece: str) -> str:
    if piece[0] != "\\":
        return piece
    if piece[1] != "u":
        return _ESCAPES.get(piece[1], piece[1])
    units = [int(unit, 16) for unit in piece.split("\\u")[1:]]
    data = b"".join(unit.to_bytes(2, "big") for unit in units)
    return data.decode("utf-16-be", errors="replace")
