"""What a command prints: its result, as text or JSON, on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable


def show(data: Callable[[], object], shown: object, as_json: bool) -> None:
    """Print the result: what ``data`` returns as JSON, or ``shown``, a text or something rich can
    draw.
    """
    if as_json:
        print(json.dumps(data(), indent=2))
    elif isinstance(shown, str):
        print(shown)
    else:
        from rich.console import Console

        Console(soft_wrap=False, width=None if sys.stdout.isatty() else 160).print(shown)


def printable(text: str) -> str:
    """Return ``text``, which may quote names from hostile files, without line breaks and terminal
    commands.
    """
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
