"""What a file of the package imports, read from its text."""

from __future__ import annotations

import ast
from pathlib import Path

from support import ROOT

PACKAGE = ROOT / "qtool"


def imports_of(path: Path) -> set[tuple[str, str]]:
    """Return (module, name in it) for each import of ``path``, wherever in it; the name is empty
    where the module itself is imported.
    """
    found = set()
    inside = ("qtool", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = inside[: len(inside) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            found |= {(module, alias.name) for alias in node.names}
    return found
