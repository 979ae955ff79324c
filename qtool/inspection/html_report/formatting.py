"""Text for the HTML report: sizes, numbers and names as people read them."""

from __future__ import annotations

import math

MAX_NAME = 160  # characters of a name that are shown
# Control characters, and those that are invisible or turn the text around them.
HIDDEN = dict.fromkeys(
    (
        *range(9),
        *range(11, 32),
        *range(127, 160),
        0x200B,
        0x200E,
        0x200F,
        0x2028,
        0x2029,
        *range(0x202A, 0x202F),
        *range(0x2060, 0x206A),
        0xFEFF,
    ),
    "\ufffd",
)


def parameters_text(count: int) -> str:
    """Return a number of parameters as model names give it, e.g. ``8.03 B``."""
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.{2 if count < 100 * scale else 1}f} {unit}"
    return str(count)


def number_text(value: float) -> str:
    """Return ``value`` with three significant digits."""
    return "NaN" if math.isnan(value) else f"{value:.3g}"


def decibel_text(value: float | None) -> str:
    """Return a ratio in decibels; None and infinity mean that the layers are equal."""
    if value is None or value == math.inf:
        return "equal"
    return "NaN" if math.isnan(value) else f"{value:.1f} dB"


def visible(value: object) -> object:
    """Return ``value``; in a string, hidden characters are replaced by a mark."""
    return value.translate(HIDDEN) if type(value) is str else value


def short(text: str, length: int = MAX_NAME) -> str:
    """Return ``text`` cut to ``length`` characters."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def log2(value: float) -> float:
    """Return the binary logarithm; 0 counts as the smallest float."""
    return math.log2(max(value, 2.0**-1074))
