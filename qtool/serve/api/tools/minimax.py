"""Tool calls as MiniMax M2 writes them.

Source: the chat template of MiniMax-M2.
"""

from __future__ import annotations

from collections.abc import Sequence

from qtool.serve.api.protocol import Tool
from qtool.serve.api.tools.argument_types import is_text, schemas_by_name
from qtool.serve.api.tools.call_reader import Reading
from qtool.serve.api.tools.marked_reader import MarkedReader, TypedArguments
from qtool.serve.api.tools.style import NAME, CallForm, ToolStyle

_START = "<minimax:tool_call>"
_END = "</minimax:tool_call>"


class InvokeParser(MarkedReader):
    """Reads ``<invoke name="f"><parameter name="key">value</parameter></invoke>``."""

    prefix = ""
    """Before the names of the tags."""

    def __init__(self, tools: Sequence[Tool]) -> None:
        self._schemas = schemas_by_name(tools)
        self.invoke = f'<{self.prefix}invoke name="'
        self._invoke_end = f"</{self.prefix}invoke>"
        self._parameter = f'<{self.prefix}parameter name="'
        self._parameter_end = f"</{self.prefix}parameter>"
        super().__init__()

    def _take_invoke(self) -> Reading[bool]:
        """Take what follows `invoke`; return whether it is a call."""
        name = yield from self._take_text('">')
        yield from self._take_space()
        part = yield from self._take_marker(self._parameter, self._invoke_end)
        if not name or not part:
            return False
        self._open_call(name)
        schemas = self._schemas.get(name, {})
        arguments = TypedArguments(schemas, self._give_arguments)
        while part == self._parameter:
            key = yield from self._take_text('">')
            if key is None:
                return True
            arguments.begin(key, is_text=key not in schemas or is_text(schemas[key]))
            if not (yield from self._take_until(arguments.push, self._parameter_end)):
                arguments.cut()
                return True
            arguments.end()
            yield from self._take_space()
            part = yield from self._take_marker(self._parameter, self._invoke_end)
        if part:
            arguments.close()
        return True


class MiniMaxParser(InvokeParser):
    """Reads one or several calls between ``<minimax:tool_call>`` and its end."""

    starts = (_START,)

    def _take_after(self, marker: str) -> Reading[bool]:
        yield from self._take_space()
        part = yield from self._take_marker(self.invoke)
        if not part or not (yield from self._take_invoke()):
            return False
        self._passed = (_END,)
        while part == self.invoke:
            yield from self._take_space()
            part = yield from self._take_marker(self.invoke, _END)
            if part == _END or (part and not (yield from self._take_invoke())):
                break
        if part == _END:
            self._held.clear()
        return True


STYLE = ToolStyle(
    make_parser=MiniMaxParser,
    shows=lambda template: "minimax:tool_call" in template and "<invoke" in template,
    markers=(_START, _END),
    form=CallForm(
        before=f"{_START}\n",
        begin=f'<invoke name="{NAME}">\n',
        end="\n</invoke>",
        between="\n",
        after=f"\n{_END}",
        arguments="minimax_xml",
    ),
)
