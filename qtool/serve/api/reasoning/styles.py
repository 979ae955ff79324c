"""The styles in which models mark their thoughts, and which style a chat template shows.

Names and markers: vLLM 0.33 `vllm/reasoning/`, SGLang 0.5.23 `srt/parser/reasoning_parser.py`, and
the published chat templates.
"""

from __future__ import annotations

from collections.abc import Mapping

from qtool.errors import UsageError, nearest
from qtool.serve.api.reasoning.thoughts import Markers, State
from qtool.serve.api.tools.harmony import MARKERS

THINK = Markers(start="<think>", end="</think>")
STYLES: Mapping[str, Markers] = {
    "deepseek_r1": Markers(start="<think>", end="</think>", implicit=True),
    "think": THINK,
    "qwen3": Markers(start="<think>", end="</think>", calls=("<tool_call>",)),
    "kimi_k2": Markers(start="<think>", end="</think>", calls=("<|tool_calls_section_begin|>",)),
    "kimi": Markers(start="◁think▷", end="◁/think▷"),
    "mistral": Markers(start="[THINK]", end="[/THINK]"),
    "gemma4": Markers(start="<|channel>thought", end="<channel|>", special=("<|channel>",)),
    "gpt-oss": Markers(
        start="<|channel|>analysis<|message|>",
        end="<|end|>",
        implicit=True,
        calls=("<|channel|>commentary",),
        in_messages=True,
        special=MARKERS,
        answer=("<|channel|>final", "<|message|>"),
    ),
    "cohere_command3": Markers(
        start="<|START_THINKING|>", end="<|END_THINKING|>", calls=("<|START_ACTION|>",)
    ),
    "granite": Markers(start="Here is my thought process:", end="Here is my response:"),
    "seed_oss": Markers(start="<seed:think>", end="</seed:think>"),
}
# Names of `--reasoning-parser` -> style
NAMES = {
    "cohere_command3": "cohere_command3",
    "cohere_command4": "cohere_command3",
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
    "gemma4": "gemma4",
    "gpt-oss": "gpt-oss",
    "granite": "granite",
    "openai_gptoss": "gpt-oss",
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


# in a chat template -> style; the first that is there
_SHOWN = {
    "<|channel|>analysis<|message|>": "gpt-oss",
    "<|START_THINKING|>": "cohere_command3",
    "[THINK]": "mistral",
    "◁think▷": "kimi",
    "<seed:think>": "seed_oss",
    "<|channel>thought": "gemma4",
    "Here is my thought process:": "granite",
    "<|tool_calls_section_begin|>": "kimi_k2",
    "<tool_call>": "qwen3",
    "<think>": "think",
    "</think>": "think",
}


def detect(template: str | None) -> str | None:
    """Return the style of thoughts that a chat template shows, or None."""
    text = template or ""
    for shown, name in _SHOWN.items():
        if shown in text and (STYLES[name].start in text or STYLES[name].end in text):
            return name
    return None


def state_after(prompt: str, markers: Markers, *, continued: str | None = None) -> State:
    """Return where the answer to ``prompt`` begins.

    Args:
        prompt: as a chat template rendered it.
        markers: around thoughts.
        continued: the beginning of the answer, where the prompt ends inside of it.
    """
    end = prompt.rstrip()
    if end.endswith(markers.start):
        return "open"
    if end.endswith(markers.end):
        return "closed"
    if not continued:
        return "undecided"
    start_at = continued.rfind(markers.start)
    end_at = continued.rfind(markers.end)
    if start_at > end_at:
        return "open"
    return "undecided" if end_at < 0 and markers.implicit else "closed"
