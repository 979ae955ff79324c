"""What the package looks like in numbers: `python tests/test_measures.py` prints them, the tests
hold them.

Targets still ahead of us stand in `LIMITS` beside the limit of today, which may only fall.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from support.imports import PACKAGE, imports_of

KERNELS = (
    *("runtime/kernels", "runtime/triton", "engine/attention"),
    *("engine/elementwise.py", "engine/elementwise_latents.py", "engine/triton_delta"),
)
BRANCHES = (
    *(ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While),
    *(ast.ExceptHandler, ast.match_case, ast.comprehension),
)
LIMITS = {  # name -> (limit of today, target)
    "lines over 100 columns": (0, 0),
    "Any in 1,000 lines": (1.6, 8.0),
    "branches of the 90th-percentile function": (6, 8),
    "functions over 80 lines": (0, 0),
    "files over 450 lines": (0, 0),
    "share of the largest folder in percent": (25.0, 25.0),
}


def is_kernel(path: Path) -> bool:
    return str(path.relative_to(PACKAGE)).startswith(KERNELS)


def branches_of(function: ast.AST) -> int:
    """Count branches, comprehensions, their conditions, and the operands after the first of `and`
    and `or`.
    """
    count = 0
    for node in ast.walk(function):
        count += isinstance(node, BRANCHES)
        if isinstance(node, ast.comprehension):
            count += len(node.ifs)
        elif isinstance(node, ast.BoolOp):
            count += len(node.values) - 1
    return count


@cache
def measure() -> dict[str, float]:
    """Return each measure of the package by its name in `LIMITS`."""
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
    lines = {path: text.splitlines() for path, text in texts.items()}
    total = sum(map(len, lines.values()))
    branches, long_functions = [], 0
    for path, text in texts.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                branches.append(branches_of(node))
                length = (node.end_lineno or 0) - node.lineno + 1
                long_functions += length > 80 and not is_kernel(path)
    folders: dict[str, int] = {}
    for path, its_lines in lines.items():
        folder = path.relative_to(PACKAGE).parts[0]
        folders[folder] = folders.get(folder, 0) + len(its_lines)
    return {
        "lines over 100 columns": sum(len(line) > 100 for each in lines.values() for line in each),
        "Any in 1,000 lines": sum(len(re.findall(r"\bAny\b", text)) for text in texts.values())
        / total
        * 1000,
        "branches of the 90th-percentile function": sorted(branches)[int(0.9 * len(branches))],
        "functions over 80 lines": long_functions,
        "files over 450 lines": sum(
            len(each) > 450 and not is_kernel(path) for path, each in lines.items()
        ),
        "share of the largest folder in percent": max(folders.values()) / total * 100,
    }


def modules_imported_by(path: Path, modules: set[str]) -> set[str]:
    """Return those of ``modules`` that a file imports; a package counts when a name is its own."""
    imported = {(f"{module}.{name}", module) for module, name in imports_of(path)}
    return {whole if whole in modules else module for whole, module in imported} & modules


def import_cycles() -> list[list[str]]:
    """Return the groups of modules that import one another, lazy imports and those for types
    included.
    """
    files = {
        "qtool."
        + ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
        if path != PACKAGE / "__init__.py"
    }
    imports = {name: modules_imported_by(path, set(files)) - {name} for name, path in files.items()}

    def reached_from(name: str) -> set[str]:
        seen: set[str] = set()
        waiting = list(imports[name])
        while waiting:
            module = waiting.pop()
            if module not in seen:
                seen.add(module)
                waiting += imports[module]
        return seen

    reached = {name: reached_from(name) for name in imports}
    groups = {
        frozenset(b for b in reached[a] if a in reached[b]) for a in imports if a in reached[a]
    }
    return sorted(sorted(group) for group in groups)


@pytest.mark.parametrize("name", LIMITS)
def test_a_measure_keeps_its_limit(name):
    assert measure()[name] <= LIMITS[name][0]


def test_no_module_imports_itself_by_way_of_others():
    assert import_cycles() == []


if __name__ == "__main__":
    for name, value in measure().items():
        print(f"{value:8.1f}  {name}; today {LIMITS[name][0]}, target {LIMITS[name][1]}")
    print(*import_cycles(), sep="\n")
