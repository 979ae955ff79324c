"""Tool calls as Phi-4-mini writes them.

Sources: the model card of Phi-4-mini-instruct; vLLM's template for it, which teaches ``functools``.
"""

from __future__ import annotations

from qtool.serve.api.tools.arrays import ArrayParser
from qtool.serve.api.tools.style import ToolStyle, json_array

_START = "<|tool_call|>"
_END = "<|/tool_call|>"

STYLE = ToolStyle(
    make_parser=lambda tools: ArrayParser((_START, "functools"), (_END,)),
    shows=lambda template: "functools[" in template or "<|/tool" in template,
    markers=(_START, _END),
    form=json_array(_START, _END),
)
