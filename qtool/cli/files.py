"""Reports that commands write beside their result."""

from __future__ import annotations

import os
from pathlib import Path

from qtool.errors import ResourceError


def check_writable(file: Path) -> None:
    """Raise ResourceError when ``file`` cannot be written."""
    existing = file if file.exists() else file.parent
    if file.is_dir() or not os.access(existing, os.W_OK):
        raise ResourceError(
            "E_OUTPUT_PLACE", f"{file}: cannot write there", hint="choose another file"
        )


def write_file(file: Path, text: str) -> None:
    """Write ``text`` to ``file``, whole or not at all: what was there stays until then. A pipe or
    a device is written as it is.
    """
    from qtool.checkpoint.aux_files import replace_text

    if file.exists() and not file.is_file():
        file.write_text(text, encoding="utf-8")
        return
    replace_text(file.resolve(), text)  # a link stays one
