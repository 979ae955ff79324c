"""Tool calls as Command R7B, Command A and later models of Cohere write them.

Source: the chat template of c4ai-command-r7b-12-2024.
"""

from __future__ import annotations

from qtool.serve.api.tools.arrays import ArrayParser
from qtool.serve.api.tools.style import NAME, CallForm, ToolStyle

_START = "<|START_ACTION|>"
_END = "<|END_ACTION|>"


class CohereParser(ArrayParser):
    """Reads ``[{"tool_call_id": "0", "tool_name": "f", "parameters": {...}}, ...]``; the numbers
    are left out, because the template counts the calls again.
    """

    name_key = "tool_name"


STYLE = ToolStyle(
    make_parser=lambda tools: CohereParser((_START,), (_END,)),
    shows=lambda template: _START in template,
    markers=(_START, _END),
    form=CallForm(
        before=f"{_START}[\n    ",
        begin=f'{{"tool_name": "{NAME}", "parameters": ',
        end="}",
        between=",\n    ",
        after=f"\n]{_END}",
    ),
)
