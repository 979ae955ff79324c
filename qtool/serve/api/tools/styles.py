"""The styles in which models write tool calls, and which style a chat template teaches."""

from __future__ import annotations

import re

from qtool.errors import UsageError, nearest

# Names of `--tool-call-parser` -> style. hermes, llama3_json, llama4_json are vLLM's; hermes, qwen,
# qwen25, llama3 SGLang's.
STYLES = {
    "hermes": "hermes",
    "qwen": "hermes",
    "qwen25": "hermes",
    "qwen3": "hermes",
    "llama3": "llama3_json",
    "llama3_json": "llama3_json",
    "llama4_json": "llama3_json",
}

_JSON_ARGUMENTS = re.compile(r"\\?\"arguments\\?\"")
# Qwen3-Coder and GLM put XML between Hermes' markers
_XML_ARGUMENTS = re.compile(r"<function=|<arg_key>")
_LLAMA_FORMAT = re.compile(r'\{\\?"name\\?": function name, \\?"parameters\\?": ')


def style_named(name: str) -> str:
    """Return the style for a value of `--tool-call-parser`. Raises: UsageError, if unknown."""
    if name not in STYLES:
        raise UsageError(
            "E_TOOLS",
            f"unknown tool call parser `{name}`",
            hint=nearest(name, STYLES) or f"known are {', '.join(STYLES)}",
        )
    return STYLES[name]


def detect(template: str | None) -> str | None:
    """Return the style of tool calls that a chat template teaches the model, or None."""
    if template is None:
        return None
    if (
        "<tool_call>" in template
        and _JSON_ARGUMENTS.search(template)
        and not _XML_ARGUMENTS.search(template)
    ):
        return "hermes"
    return "llama3_json" if _LLAMA_FORMAT.search(template) else None
