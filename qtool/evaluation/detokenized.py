"""Tokens as text, for people. The tokenizer comes from a stranger, so it runs in a process with
limits.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from qtool.sandbox import Sandbox, SandboxError
from qtool.sandbox.blocking import BlockingSandbox

TIMEOUT_S = 30.0
MEMORY_BYTES = 2 << 30
OUTPUT_BYTES = 64 << 20


def as_texts(folder: Path, pieces: Sequence[Sequence[int]]) -> list[str]:
    """Return the text of each piece of token ids, by the tokenizer.json in ``folder``; the numbers
    themselves, when that cannot be used.
    """
    file = folder / "tokenizer.json"
    if pieces and file.is_file():
        sandbox = Sandbox(
            f"{__name__}:{decode.__name__}",
            timeout_s=TIMEOUT_S,
            memory_bytes=MEMORY_BYTES,
            output_bytes=OUTPUT_BYTES,
            environment={"TOKENIZERS_PARALLELISM": "false"},
        )
        try:
            with BlockingSandbox(sandbox) as caller:
                given = [list(piece) for piece in pieces]
                found = caller.call(str(file.resolve()), given, timeout_s=TIMEOUT_S)
            return cast(list[str], found)
        except SandboxError:
            pass  # for people only
    return [" ".join(f"<{token}>" for token in piece) for piece in pieces]


def decode(file: str, pieces: list[list[int]]) -> list[str]:
    """Return the texts of ``pieces``: runs in the child."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(file)
    return [tokenizer.decode(piece, skip_special_tokens=False) for piece in pieces]
