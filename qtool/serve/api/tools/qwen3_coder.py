"""Tool calls as Qwen3-Coder and its successors write them, in XML, and Seed-OSS with other markers.

Source: the chat templates of Qwen3-Coder and Seed-OSS.
"""

from __future__ import annotations

from collections.abc import Sequence

from qtool.serve.api.protocol import Tool
from qtool.serve.api.tools.argument_types import is_text, schemas_by_name
from qtool.serve.api.tools.call_reader import Reading
from qtool.serve.api.tools.marked_reader import MarkedReader, TypedArguments
from qtool.serve.api.tools.style import NAME, CallForm, ToolStyle


class Qwen3CoderParser(MarkedReader):
    """Reads ``<tool_call><function=name><parameter=key>value</parameter></function></tool_call>``;
    the outer markers may be missing.
    """

    outer = ("<tool_call>", "</tool_call>")
    wrapped = True
    """Whether a line break stands before and after each value."""

    def __init__(self, tools: Sequence[Tool]) -> None:
        self.starts = (self.outer[0], "<function=")
        self._ends = ("</parameter>", "<parameter=", "</function>", self.outer[1])
        self._schemas = schemas_by_name(tools)
        super().__init__()

    def _take_after(self, marker: str) -> Reading[bool]:
        if marker == self.outer[0]:
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
        self._passed = ("</function>", self.outer[1])
        schemas = self._schemas.get(name, {})
        arguments = TypedArguments(schemas, self._give_arguments, wrapped=self.wrapped)
        while part == "<parameter=":
            key = yield from self._take_text(">")
            if key is None:
                return True
            arguments.begin(key, is_text=key not in schemas or is_text(schemas[key]))
            end = yield from self._take_until(arguments.push, *self._ends)
            if not end:
                arguments.cut()
                return True
            arguments.end()
            if end == "</parameter>":
                yield from self._take_space()
                end = yield from self._take_marker(*self._ends[1:])
            part = end
        if part:
            arguments.close()
        return True


class SeedParser(Qwen3CoderParser):
    """Reads the same between Seed-OSS' markers, with values as they are."""

    outer = ("<seed:tool_call>", "</seed:tool_call>")
    wrapped = False


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
SEED = ToolStyle(
    make_parser=SeedParser,
    shows=lambda template: SeedParser.outer[0] in template,
    markers=SeedParser.outer,
)
