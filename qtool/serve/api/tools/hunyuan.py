"""Tool calls as Hunyuan A13B writes them.

Source: vLLM's template for it, `examples/tool_chat_template_hunyuan_a13b.jinja`.
"""

from __future__ import annotations

from qtool.serve.api.tools.arrays import ArrayParser
from qtool.serve.api.tools.style import ToolStyle, json_array

_START = "<tool_calls>"
_END = "</tool_calls>"

STYLE = ToolStyle(
    make_parser=lambda tools: ArrayParser((_START,), (_END,)),
    shows=lambda template: f"{_START}[" in template or f"'{_START}'" in template,
    markers=(_START, _END),
    form=json_array(_START, _END),
)
