"""Tool calls as lists of Python calls, as Llama 3.2 and 4, Gemma 3, OLMo 3 and LFM2 write them.

Sources: vLLM's templates for these models.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from qtool.serve.api.tools.argument_types import parse_literal
from qtool.serve.api.tools.call_reader import CallReader, Reading
from qtool.serve.api.tools.marked_reader import dumps
from qtool.serve.api.tools.style import ToolStyle

_STARTS = ("<|python_start|>", "<|tool_call_start|>", "<function_calls>")
_ENDS = ("<|python_end|>", "<|tool_call_end|>", "</function_calls>")
_NO_MARKER = re.compile(r"[^<]+")
_WORD = re.compile(r"[\w.-]+")
_IN_STRING = {'"': re.compile(r'[^"\\]+'), "'": re.compile(r"[^'\\]+")}
_IN_VALUE = re.compile(r"[^\"'\[\](){},\\]+")


class PythonicParser(CallReader):
    """Reads ``[f(a=1, b="x"), g()]`` at the start of an answer, where the functions are among the
    tools, and after a marker, where brackets may be missing.

    Each argument is given out when it is complete.
    """

    def __init__(self, tool_names: Iterable[str]) -> None:
        self._names = frozenset(tool_names)
        super().__init__()

    def _read(self) -> Reading[None]:
        yield from self._take_space()
        if (yield from self._peek()) == "[":
            yield from self._take_list(self._names)
        self._give_content()
        while char := (yield from self._rest()):
            if char != "<":
                self._take(_NO_MARKER)
            else:
                marker = yield from self._take_marker(*_STARTS, *(_ENDS if self._calls else ()))
                if marker in _ENDS:
                    self._held.clear()
                elif marker:
                    yield from self._take_list(None)
            self._give_content()

    def _take_list(self, known: frozenset[str] | None) -> Reading[None]:
        """Take calls; what is held after them is content."""
        yield from self._take_space()
        bracket = (yield from self._peek()) == "["
        if bracket:
            self._take()
        elif known is not None:
            return
        while (yield from self._take_python_call(known)):
            more = yield from self._take_char(",")
            if not more and bracket:
                if (yield from self._take_char("]")):
                    self._held.clear()
                return
            if more:
                self._held.clear()

    def _take_python_call(self, known: frozenset[str] | None) -> Reading[bool]:
        name = yield from self._take_word()
        if not name or (known is not None and name not in known):
            return False
        if (yield from self._peek()) != "(":
            return False
        self._take()
        self._begin_call(name)
        self._held.clear()
        opened = False
        while not (yield from self._take_char(")")):
            key = yield from self._take_word()
            if not key or not (yield from self._take_char("=")):
                return False
            pieces: list[str] = []
            ended = yield from self._take_python_value(pieces)
            text = "".join(pieces).strip()
            if not text:
                return False
            value = dumps(parse_literal(text)) if ended else text
            self._give_arguments(f"{', ' if opened else '{'}{dumps(key)}: {value}")
            opened = True
            if not ended:
                return False
            yield from self._take_char(",")
        self._give_arguments("}" if opened else "{}")
        return True

    def _take_word(self) -> Reading[str]:
        yield from self._take_space()
        word = ""
        while (yield from self._peek()) and (text := self._take(_WORD)):
            word += text
        return word

    def _take_python_value(self, pieces: list[str]) -> Reading[bool]:
        """Take a value up to the comma or bracket that ends it; return False if it breaks off."""
        depth = 0
        while char := (yield from self._peek()):
            if not depth and char in ",)":
                return True
            if char in _IN_STRING:
                if not (yield from self._take_quoted(char, pieces)):
                    return False
                continue
            depth += (char in "[({") - (char in "])}")
            if depth < 0:
                return False
            pieces.append(self._take(_IN_VALUE) or self._take())
        return False

    def _take_quoted(self, quote: str, pieces: list[str]) -> Reading[bool]:
        pieces.append(self._take())
        while char := (yield from self._peek()):
            if char == quote:
                pieces.append(self._take())
                return True
            if char == "\\":
                pieces.append(self._take())
                if (yield from self._peek()):
                    pieces.append(self._take())
            else:
                pieces.append(self._take(_IN_STRING[quote]))
        return False


_SHOWN = re.compile(r"\[func_name1\(|<function_calls>|<\|python_start\|>|<\|tool_call_start\|>")

STYLE = ToolStyle(
    make_parser=lambda tools: PythonicParser(tool.function.name for tool in tools),
    shows=lambda template: _SHOWN.search(template) is not None,
    markers=(*_STARTS, *_ENDS),
)
