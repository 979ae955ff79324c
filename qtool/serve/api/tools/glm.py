"""Tool calls as GLM-4.5 and later write them.

Source: the chat templates of GLM-4.5 and GLM-4.7.
"""

from __future__ import annotations

from collections.abc import Sequence

from qtool.serve.api.protocol import Tool
from qtool.serve.api.tools.argument_types import is_text, schemas_by_name
from qtool.serve.api.tools.call_reader import Reading
from qtool.serve.api.tools.marked_reader import MarkedReader, TypedArguments
from qtool.serve.api.tools.style import NAME, CallForm, ToolStyle


class GlmParser(MarkedReader):
    """Reads ``<tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value></tool_call>``."""

    starts = ("<tool_call>",)

    def __init__(self, tools: Sequence[Tool]) -> None:
        self._schemas = schemas_by_name(tools)
        super().__init__()

    def _take_after(self, marker: str) -> Reading[bool]:
        pieces: list[str] = []
        part = yield from self._take_until(pieces.append, "<arg_key>", "</tool_call>")
        name = "".join(pieces).strip()
        if not part or not name or "<" in name or "\n" in name:
            return False
        self._open_call(name)
        schemas = self._schemas.get(name, {})
        arguments = TypedArguments(schemas, self._give_arguments)
        while part == "<arg_key>":
            key = yield from self._take_text("</arg_key>")
            yield from self._take_space()
            if key is None or not (yield from self._take_marker("<arg_value>")):
                return True
            arguments.begin(key, is_text=is_text(schemas.get(key)))
            if not (yield from self._take_until(arguments.push, "</arg_value>")):
                arguments.cut()
                return True
            arguments.end()
            yield from self._take_space()
            part = yield from self._take_marker("<arg_key>", "</tool_call>")
        if part:
            arguments.close()
        return True


STYLE = ToolStyle(
    make_parser=GlmParser,
    shows=lambda template: "<arg_key>" in template and "<arg_value>" in template,
    markers=(
        "<tool_call>",
        "</tool_call>",
        "<arg_key>",
        "</arg_key>",
        "<arg_value>",
        "</arg_value>",
    ),
    form=CallForm(
        begin=f"<tool_call>{NAME}", end="</tool_call>", between="\n", arguments="glm_xml"
    ),
)
