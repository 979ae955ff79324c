"""The names of what a checkpoint can be converted to.

Imports no torch, so that a wrong name is refused at once.
"""

from __future__ import annotations

from qtool.errors import UsageError, nearest
from qtool.formats import WRITABLE, Format

UNQUANTIZED = {"bf16": "BF16", "f16": "F16"}  # target -> dtype of its weights
GPTQ_V2 = "gptq_v2"
GGUF = "gguf"  # one file, with names and rules of its own
TARGETS = (*WRITABLE, GPTQ_V2, *UNQUANTIZED, GGUF)
ALIASES = {
    "fp16": "f16",
    "float16": "f16",
    "bfloat16": "bf16",
    "fp8": "fp8_block",
    "fp8-block": "fp8_block",
    "compressed_tensors": "compressed-tensors",
    "gptq-v2": GPTQ_V2,
}


def target_named(name: str) -> str:
    """Return the target that ``name`` means. Raises: UsageError, with the nearest name."""
    target = ALIASES.get(name.lower(), name.lower())
    if target not in TARGETS:
        raise UsageError(
            "E_UNKNOWN_FORMAT",
            f"unknown format `{name}`",
            hint=nearest(name, TARGETS) or f"one of {', '.join(TARGETS)}",
        )
    return target


def format_of(to: str) -> Format:
    """Return the format that writes the target ``to``, a format or a version of one."""
    return WRITABLE["gptq" if to == GPTQ_V2 else to]
