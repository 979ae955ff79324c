"""Tool calls as FunctionGemma and Gemma 4 write them.

Sources: their chat templates.
"""

from __future__ import annotations

import re

from qtool.serve.api.tools.call_reader import Reading
from qtool.serve.api.tools.marked_reader import MarkedReader, dumps
from qtool.serve.api.tools.style import ToolStyle

_QUOTES = ("<escape>", '<|"|>')
_WORD = re.compile(r"[^<{}\[\],:]+")
_JSON_WORD = re.compile(r"(?:true|false|null|-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?)\Z")


class GemmaParser(MarkedReader):
    """Reads ``call:name{key:value,...}`` between markers; strings stand between ``<escape>`` or
    ``<|"|>``, keys need not.
    """

    starts = ("<start_function_call>", "<|tool_call>")

    def _take_after(self, marker: str) -> Reading[bool]:
        name = yield from self._take_text("{")
        if not name or not name.startswith("call:") or "<" in name:
            return False
        self._open_call(name.removeprefix("call:").strip())
        self._give_arguments("{")
        self._passed = ("<end_function_call>", "<tool_call|>")
        yield from self._take_members()
        return True

    def _take_members(self) -> Reading[None]:
        """Take and return members up to the bracket that ends the arguments."""
        open_brackets = ["}"]
        wants_key = True
        while open_brackets:
            yield from self._take_space()
            char = yield from self._peek()
            if not char:
                return
            if char == open_brackets[-1]:
                open_brackets.pop()
                self._give_arguments(self._take())
                wants_key = False
            elif char in "{[":
                open_brackets.append("}" if char == "{" else "]")
                self._give_arguments(self._take())
                wants_key = char == "{"
            elif char in ",:":
                self._take()
                self._give_arguments(f"{char} ")
                wants_key = char == "," and open_brackets[-1] == "}"
            elif char == "<":
                if not (yield from self._take_quoted()):
                    return
            elif not (yield from self._take_word(is_key=wants_key)):
                return

    def _take_quoted(self) -> Reading[bool]:
        quote = yield from self._take_marker(*_QUOTES)
        if not quote:
            return False
        self._give_arguments('"')
        end = yield from self._take_until(lambda text: self._give_arguments(_escaped(text)), quote)
        if end:
            self._give_arguments('"')
        return bool(end)

    def _take_word(self, *, is_key: bool) -> Reading[bool]:
        word = ""
        while (yield from self._peek()) and (text := self._take(_WORD)):
            word += text
        word = word.strip()
        if word:
            is_json = not is_key and _JSON_WORD.match(word)
            self._give_arguments(word if is_json else dumps(word))
        return bool(word)


def _escaped(text: str) -> str:
    return dumps(text)[1:-1]


STYLE = ToolStyle(
    make_parser=lambda tools: GemmaParser(),
    shows=lambda template: "<start_function_call>" in template or "<|tool_call>" in template,
    markers=(
        "<start_function_call>",
        "<end_function_call>",
        "<|tool_call>",
        "<tool_call|>",
        *_QUOTES,
    ),
)
