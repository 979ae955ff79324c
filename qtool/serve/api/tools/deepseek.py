"""Tool calls as DeepSeek V3, R1 and V3.1 write them.

Sources: the chat templates of DeepSeek-V3-0324 and DeepSeek-V3.1.
"""

from __future__ import annotations

from qtool.serve.api.tools.call_reader import Reading
from qtool.serve.api.tools.marked_reader import MarkedReader
from qtool.serve.api.tools.style import NAME, CallForm, ToolStyle

_START = "<｜tool▁calls▁begin｜>"
_END = "<｜tool▁calls▁end｜>"
_CALL = "<｜tool▁call▁begin｜>"
_CALL_END = "<｜tool▁call▁end｜>"
_SEPARATOR = "<｜tool▁sep｜>"
_FENCE = "```json"


class DeepSeekParser(MarkedReader):
    """Reads calls between their markers: the arguments follow the name, in V3 in a fence after the
    type ``function`` and the name.
    """

    starts = (_START, _CALL)

    def _take_after(self, marker: str) -> Reading[bool]:
        if marker == _START:
            yield from self._take_space()
            if not (yield from self._take_marker(_CALL)):
                return False
        name = yield from self._take_text(_SEPARATOR)
        fenced = False
        if name == "function" and (yield from self._peek()) not in ("{", ""):
            name = yield from self._take_text(_FENCE)
            fenced = True
        if not name or "\n" in name or "<" in name:
            return False
        if not (yield from self._take_json_after(name)):
            return False
        if fenced:
            yield from self._take_space()
            if (yield from self._take_marker("```")):
                self._held.clear()
        self._passed = (_CALL_END, _END)
        return True


STYLE = ToolStyle(
    make_parser=lambda tools: DeepSeekParser(),
    shows=lambda template: _START in template and "```json" in template,
    markers=(_START, _END, _CALL, _CALL_END, _SEPARATOR),
    form=CallForm(
        before=_START,
        begin=f"{_CALL}function{_SEPARATOR}{NAME}\n```json\n",
        end=f"\n```{_CALL_END}",
        between="\n",
        after=_END,
    ),
)
V31 = ToolStyle(
    make_parser=lambda tools: DeepSeekParser(),
    shows=lambda template: _START in template,
    markers=STYLE.markers,
    form=CallForm(
        before=_START,
        begin=f"{_CALL}{NAME}{_SEPARATOR}",
        end=_CALL_END,
        between="",
        after=_END,
    ),
)
