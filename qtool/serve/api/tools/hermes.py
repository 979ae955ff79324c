"""Tool calls as Hermes, Qwen 2.5 and Qwen 3 write them."""

from __future__ import annotations

import re

from qtool.serve.api.tools.call_reader import Reading
from qtool.serve.api.tools.marked_reader import MarkedReader
from qtool.serve.api.tools.style import NAME, CallForm, ToolStyle

_JSON_ARGUMENTS = re.compile(r"\\?\"arguments\\?\"")
# Qwen3-Coder and GLM put XML between the markers
_XML_ARGUMENTS = re.compile(r"<function=|<arg_key>")


class HermesParser(MarkedReader):
    """Reads calls between ``<tool_call>`` and ``</tool_call>``, with content around them.

    A call counts without its end marker, too.
    """

    starts = ("<tool_call>",)

    def _take_after(self, marker: str) -> Reading[bool]:
        yield from self._take_space()
        called = yield from self._take_call()
        if called:
            self._held.clear()
            self._passed = ("</tool_call>",)
        return called


def _shows(template: str) -> bool:
    return (
        "<tool_call>" in template
        and _JSON_ARGUMENTS.search(template) is not None
        and not _XML_ARGUMENTS.search(template)
    )


STYLE = ToolStyle(
    make_parser=lambda tools: HermesParser(),
    shows=_shows,
    markers=("<tool_call>", "</tool_call>"),
    form=CallForm(
        begin=f'<tool_call>\n{{"name": "{NAME}", "arguments": ',
        end="}\n</tool_call>",
        between="\n",
    ),
)
