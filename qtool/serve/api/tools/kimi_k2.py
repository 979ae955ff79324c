"""Tool calls as Kimi K2 writes them.

Source: the guide to tool calls that is published with Kimi-K2-Instruct.
"""

from __future__ import annotations

from qtool.serve.api.tools.call_reader import Reading
from qtool.serve.api.tools.marked_reader import MarkedReader
from qtool.serve.api.tools.style import NAME, CallForm, ToolStyle

_START = "<|tool_calls_section_begin|>"
_END = "<|tool_calls_section_end|>"
_CALL = "<|tool_call_begin|>"
_ARGUMENTS = "<|tool_call_argument_begin|>"
_CALL_END = "<|tool_call_end|>"


class KimiK2Parser(MarkedReader):
    """Reads calls by their id, ``functions.name:number``, which clients get as it is: the model
    knows its calls by it.
    """

    starts = (_START, _CALL)

    def _take_after(self, marker: str) -> Reading[bool]:
        if marker == _START:
            yield from self._take_space()
            if not (yield from self._take_marker(_CALL)):
                return False
        call_id = yield from self._take_text(_ARGUMENTS)
        if not call_id or "\n" in call_id:
            return False
        name = call_id.removeprefix("functions.").rpartition(":")[0] or call_id
        called = yield from self._take_json_after(name, call_id)
        if called:
            self._passed = (_CALL_END, _END)
        return called


STYLE = ToolStyle(
    make_parser=lambda tools: KimiK2Parser(),
    shows=lambda template: _START in template,
    markers=(_START, _END, _CALL, _CALL_END, _ARGUMENTS),
    form=CallForm(
        before=_START,
        begin=f"{_CALL}functions.{NAME}:",
        numbered=_ARGUMENTS,
        end=_CALL_END,
        between="",
        after=_END,
    ),
)
