"""Tool calls as Granite 3 writes them; Granite 4 writes Hermes'.

Source: the chat templates of Granite 3.1 to 3.3.
"""

from __future__ import annotations

from qtool.serve.api.tools.arrays import ArrayParser
from qtool.serve.api.tools.style import ToolStyle, json_array

STYLE = ToolStyle(
    make_parser=lambda tools: ArrayParser(("<|tool_call|>", "<tool_call>")),
    shows=lambda template: "<|tool_call|>" in template and "<|/tool_call|>" not in template,
    markers=("<|tool_call|>", "<tool_call>"),
    form=json_array("<|tool_call|>"),
)
