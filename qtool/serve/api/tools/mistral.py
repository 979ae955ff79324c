"""Tool calls as Mistral's models write them, in both layouts of their tokenizers.

Sources: the published chat templates; mistral-common, versions 3 to 13 of the tokenizer.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable

from qtool.serve.api.tools.call_reader import Reading
from qtool.serve.api.tools.marked_reader import MarkedReader
from qtool.serve.api.tools.style import NAME, CallForm, ToolStyle, json_array

_START = "[TOOL_CALLS]"
_ID = "[CALL_ID]"
_ARGUMENTS = "[ARGS]"
_LETTERS = string.ascii_letters + string.digits


class MistralParser(MarkedReader):
    """Reads ``[TOOL_CALLS][{"name": ..., "arguments": ...}]``, and ``[TOOL_CALLS]name{...}`` with
    ``[CALL_ID]`` or ``[ARGS]`` between, once for each call.

    Ids have nine letters or digits, as the templates ask for.
    """

    starts = (_START,)

    def _new_id(self) -> str:
        return "".join(secrets.choice(_LETTERS) for _ in range(9))

    def _take_after(self, marker: str) -> Reading[bool]:
        yield from self._take_space()
        first = yield from self._peek()
        if first == "[":
            return (yield from self._take_calls())
        if first == "{":
            called = yield from self._take_call()
            if called:
                self._held.clear()
            return called
        return (yield from self._take_named())

    def _take_named(self) -> Reading[bool]:
        pieces: list[str] = []
        call_id: list[str] = []
        part = yield from self._take_part(pieces.append)
        if part == _ID:
            part = yield from self._take_part(call_id.append)
        name = "".join(pieces).strip()
        if part is None or not name or "\n" in name:
            return False
        return (yield from self._take_json_after(name, "".join(call_id).strip() or None))

    def _take_part(self, give: Callable[[str], object]) -> Reading[str | None]:
        """Take text up to a marker, which is returned, or up to arguments; None at the end."""
        while char := (yield from self._peek()):
            if char == "{":
                return ""
            if char != "[":
                give(self._take())
            elif marker := (yield from self._take_marker(_ID, _ARGUMENTS)):
                return marker
            else:
                return None
        return None


STYLE = ToolStyle(
    make_parser=lambda tools: MistralParser(),
    shows=lambda template: _START in template,
    markers=(_START, _ID, _ARGUMENTS),
    form=json_array(_START),
)
V11 = ToolStyle(  # the layout since version 11 of the tokenizer
    make_parser=lambda tools: MistralParser(),
    shows=lambda template: _START in template and _ARGUMENTS in template,
    markers=STYLE.markers,
    form=CallForm(begin=f"{_START}{NAME}{_ARGUMENTS}", end="", between=""),
)
