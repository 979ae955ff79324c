"""Tool calls as Qwen3-Coder and its successors write them, in XML.

Source: the chat template of Qwen3-Coder.
"""

from __future__ import annotations

from collections.abc import Sequence

from qtool.serve.api.protocol import Tool
from qtool.serve.api.tools.argument_types import is_text, schemas_by_name
from qtool.serve.api.tools.call_reader import Reading
from qtool.serve.api.tools.marked_reader import MarkedReader, TypedArguments
from qtool.serve.api.tools.style import NAME, CallForm, ToolStyle

_ENDS = ("</parameter>", "<parameter=", "</function>", "</tool_call>")


class Qwen3CoderParser(MarkedReader):
    """Reads ``<tool_call><function=name><parameter=key>value</parameter></function></tool_call>``;
    the outer markers may be missing.
    """

    starts = ("<tool_call>", "<function=")

    def __init__(self, tools: Sequence[Tool]) -> None:
        self._schemas = schemas_by_name(tools)
        super().__init__()

    def _take_after(self, marker: str) -> Reading[bool]:
        if marker == "<tool_call>":
            yield from self._take_space()
            if not (yield from self._take_marker("<function=")):
                return False
        name = yield from self._take_text(">")
        if not name or "<" in name:
            return False
        yield from self._take_space()
        part = yield from self._take_marker("<parameter=", "</function>")
        if not part:
            return False
        self._open_call(name)
        self._passed = ("</function>", "</tool_call>")
        schemas = self._schemas.get(name, {})
        arguments = TypedArguments(schemas, self._give_arguments, wrapped=True)
        while part == "<parameter=":
            key = yield from self._take_text(">")
            if key is None:
                return True
            arguments.begin(key, is_text=key not in schemas or is_text(schemas[key]))
            end = yield from self._take_until(arguments.push, *_ENDS)
            if not end:
                arguments.cut()
                return True
            arguments.end()
            if end == "</parameter>":
                yield from self._take_space()
                end = yield from self._take_marker(*_ENDS[1:])
            part = end
        if part:
            arguments.close()
        return True


STYLE = ToolStyle(
    make_parser=Qwen3CoderParser,
    shows=lambda template: "<function=" in template and "<parameter=" in template,
    markers=("<tool_call>", "</tool_call>"),
    form=CallForm(
        begin=f"<tool_call>\n<function={NAME}>\n",
        end="\n</function>\n</tool_call>",
        between="\n",
        arguments="qwen_xml",
    ),
)
