"""Tool calls as DeepSeek V3.2 writes them, in XML.

Source: the encoding that is published with DeepSeek-V3.2.
"""

from __future__ import annotations

from collections.abc import Sequence

from qtool.serve.api.protocol import Tool
from qtool.serve.api.tools.argument_types import schemas_by_name
from qtool.serve.api.tools.call_reader import Reading
from qtool.serve.api.tools.marked_reader import MarkedReader, TypedArguments
from qtool.serve.api.tools.style import NAME, CallForm, ToolStyle

_D = "｜DSML｜"
_START = f"<{_D}function_calls>"
_END = f"</{_D}function_calls>"
_INVOKE = f'<{_D}invoke name="'
_INVOKE_END = f"</{_D}invoke>"
_PARAMETER = f'<{_D}parameter name="'
_PARAMETER_END = f"</{_D}parameter>"


class DeepSeekV32Parser(MarkedReader):
    """Reads ``invoke`` elements of ``parameter`` elements, which say whether they are strings."""

    starts = (_START, _INVOKE)

    def __init__(self, tools: Sequence[Tool]) -> None:
        self._schemas = schemas_by_name(tools)
        super().__init__()

    def _take_after(self, marker: str) -> Reading[bool]:
        if marker == _START:
            yield from self._take_space()
            if not (yield from self._take_marker(_INVOKE)):
                return False
        name = yield from self._take_text('">')
        yield from self._take_space()
        part = yield from self._take_marker(_PARAMETER, _INVOKE_END)
        if not name or not part:
            return False
        self._open_call(name)
        self._passed = (_END,)
        arguments = TypedArguments(self._schemas.get(name, {}), self._give_arguments)
        while part == _PARAMETER:
            key = yield from self._take_text('" string="')
            kind = yield from self._take_text('">')
            if key is None or kind is None:
                return True
            arguments.begin(key, is_text=kind == "true")
            if not (yield from self._take_until(arguments.push, _PARAMETER_END)):
                arguments.cut()
                return True
            arguments.end()
            yield from self._take_space()
            part = yield from self._take_marker(_PARAMETER, _INVOKE_END)
        if part:
            arguments.close()
        return True


STYLE = ToolStyle(
    make_parser=DeepSeekV32Parser,
    shows=lambda template: _D in template,
    markers=(_D,),
    form=CallForm(
        before=f"{_START}\n",
        begin=f'{_INVOKE}{NAME}">\n',
        end=f"\n{_INVOKE_END}",
        between="\n",
        after=f"\n{_END}",
        arguments="deepseek_xml",
    ),
)
