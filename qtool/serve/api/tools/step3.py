"""Tool calls as Step-3 writes them; Step-3.5 writes Qwen3-Coder's.

Source: SGLang 0.5.23 `srt/function_call/step3_detector.py`, which documents the format.
"""

from __future__ import annotations

from qtool.serve.api.tools.call_reader import Reading
from qtool.serve.api.tools.minimax import InvokeParser
from qtool.serve.api.tools.style import ToolStyle

_START = "<｜tool_calls_begin｜>"
_END = "<｜tool_calls_end｜>"
_CALL = "<｜tool_call_begin｜>"
_CALL_END = "<｜tool_call_end｜>"
_SEPARATOR = "<｜tool_sep｜>"
_FUNCTION = f"function{_SEPARATOR}"


class Step3Parser(InvokeParser):
    """Reads ``<steptml:invoke name="f">`` with its parameters, after ``function`` and a separator,
    each between markers of its own.
    """

    starts = (_START, _CALL)
    prefix = "steptml:"

    def _take_after(self, marker: str) -> Reading[bool]:
        if marker == _START:
            yield from self._take_space()
            if not (yield from self._take_marker(_CALL)):
                return False
        part = yield from self._take_marker(_FUNCTION, self.invoke)
        if part == _FUNCTION:
            yield from self._take_space()
            part = yield from self._take_marker(self.invoke)
        if not part or not (yield from self._take_invoke()):
            return False
        self._passed = (_CALL_END, _END, _SEPARATOR)
        return True


STYLE = ToolStyle(
    make_parser=Step3Parser,
    shows=lambda template: "steptml:invoke" in template,
    markers=(_START, _END, _CALL, _CALL_END, _SEPARATOR),
)
