"""The styles in which models write tool calls, and which style a chat template teaches.

Names: vLLM 0.33 `vllm/tool_parsers/__init__.py`, SGLang 0.5.23
`srt/function_call/function_call_parser.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

from qtool.errors import UsageError, nearest
from qtool.serve.api.tools import (
    cohere,
    deepseek,
    deepseek_v32,
    gemma,
    glm,
    granite,
    harmony,
    hermes,
    hunyuan,
    kimi_k2,
    llama,
    minimax,
    mistral,
    phi4,
    pythonic,
    qwen3_coder,
    step3,
    xlam,
)
from qtool.serve.api.tools.style import ToolStyle

# the first that a template shows is chosen: what is more particular stands before
STYLES: Mapping[str, ToolStyle] = {
    "gpt-oss": harmony.STYLE,
    "deepseek_v32": deepseek_v32.STYLE,
    "deepseek_v3": deepseek.STYLE,
    "deepseek_v31": deepseek.V31,
    "kimi_k2": kimi_k2.STYLE,
    "minimax_m2": minimax.STYLE,
    "step3": step3.STYLE,
    "cohere_command3": cohere.STYLE,
    "hunyuan": hunyuan.STYLE,
    "glm45": glm.STYLE,
    "seed_oss": qwen3_coder.SEED,
    "qwen3_coder": qwen3_coder.STYLE,
    "mistral_v11": mistral.V11,
    "mistral": mistral.STYLE,
    "gemma": gemma.STYLE,
    "phi4_mini_json": phi4.STYLE,
    "hermes": hermes.STYLE,
    "granite": granite.STYLE,
    "llama3_json": llama.STYLE,
    "xlam": xlam.STYLE,
    "pythonic": pythonic.STYLE,
}
# Names of `--tool-call-parser` -> style
NAMES = {
    **{name: name for name in STYLES},
    "openai": "gpt-oss",
    "cohere_command4": "cohere_command3",
    "deepseekv3": "deepseek_v3",
    "deepseekv31": "deepseek_v31",
    "deepseekv32": "deepseek_v32",
    "ernie45": "hermes",
    "functiongemma": "gemma",
    "gemma4": "gemma",
    "glm": "glm45",
    "glm47": "glm45",
    "granite4": "hermes",
    "hunyuan_a13b": "hunyuan",
    "lfm2": "pythonic",
    "llama3": "llama3_json",
    "llama4_json": "llama3_json",
    "llama4_pythonic": "pythonic",
    "mimo": "qwen3_coder",
    "minimax-m2": "minimax_m2",
    "olmo3": "pythonic",
    "qwen": "hermes",
    "qwen25": "hermes",
    "qwen3": "hermes",
    "qwen3_xml": "qwen3_coder",
    "step3p5": "qwen3_coder",
}


def style_named(name: str) -> str | None:
    """Return the style for a value of `--tool-call-parser`; None for ``none``.

    Raises: UsageError, if it is unknown.
    """
    if name == "none":
        return None
    if name not in NAMES:
        raise UsageError(
            "E_TOOLS",
            f"unknown tool call parser `{name}`",
            hint=nearest(name, NAMES) or f"known are auto, none, {', '.join(NAMES)}",
        )
    return NAMES[name]


def detect(template: str | None) -> str | None:
    """Return the style of tool calls that a chat template teaches the model, or None."""
    if template is None:
        return None
    return next((name for name, style in STYLES.items() if style.shows(template)), None)
