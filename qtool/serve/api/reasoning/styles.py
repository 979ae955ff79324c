"""The styles in which models mark their thoughts, and which style a chat template shows.

Names and markers: vLLM 0.33 `vllm/reasoning/`, SGLang 0.5.23 `srt/parser/reasoning_parser.py`, and
the published chat templates.
"""

from __future__ import annotations

from collections.abc import Mapping

from qtool.errors import UsageError, nearest
from qtool.serve.api.reasoning.thoughts import Markers, State

THINK = Markers(start="<think>", end="</think>")
STYLES: Mapping[str, Markers] = {
    "deepseek_r1": Markers(start="<think>", end="</think>", implicit=True),
    "think": THINK,
    "qwen3": Markers(start="<think>", end="</think>", calls=("<tool_call>",)),
    "kimi_k2": Markers(start="<think>", end="</think>", calls=("<|tool_calls_section_begin|>",)),
    "kimi": Markers(start="◁think▷", end="◁/think▷"),
    "mistral": Markers(start="[THINK]", end="[/THINK]"),
    "granite": Markers(start="Here is my thought process:", end="Here is my response:"),
    "seed_oss": Markers(start="<seed:think>", end="</seed:think>"),
}
# Names of `--reasoning-parser` -> style
NAMES = {
    "deepseek_r1": "deepseek_r1",
    "deepseek-r1": "deepseek_r1",
    "deepseek_v3": "think",
    "deepseek-v3": "think",
    "glm45": "qwen3",
    "glm47": "qwen3",
    "holo2": "think",
    "interns1": "qwen3",
    "kimi": "kimi",
    "kimi_k2": "kimi_k2",
    "mimo": "qwen3",
    "minimax": "deepseek_r1",
    "minimax_m2": "deepseek_r1",
    "mistral": "mistral",
    "nemotron_3": "think",
    "nemotron_v3": "think",
    "olmo3": "deepseek_r1",
    "qwen3": "qwen3",
    "qwen3-thinking": "deepseek_r1",
    "granite": "granite",
    "seed_oss": "seed_oss",
    "step3": "deepseek_r1",
    "step3p5": "deepseek_r1",
}


def style_named(name: str) -> str | None:
    """Return the style for a value of `--reasoning-parser`; None for ``none``.

    Raises: UsageError, if it is unknown.
    """
    if name == "none":
        return None
    if name not in NAMES:
        raise UsageError(
            "E_REASONING",
            f"unknown reasoning parser `{name}`",
            hint=nearest(name, NAMES) or f"known are auto, none, {', '.join(NAMES)}",
        )
    return NAMES[name]


def detect(template: str | None) -> str | None:
    """Return the style of thoughts that a chat template shows, or None."""
    if template is None:
        return None
    return next((name for name in ("qwen3",) if STYLES[name].end in template), None)


def state_after(prompt: str, markers: Markers) -> State:
    """Return where the answer to ``prompt`` begins, which a chat template rendered."""
    end = prompt.rstrip()
    if end.endswith(markers.start):
        return "open"
    return "closed" if end.endswith(markers.end) else "undecided"
