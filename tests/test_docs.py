"""The documents are held to the program: `python tests/test_docs.py` writes the blocks that are
generated, the tests compare them and check links, paths, commands and Python code.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import get_args

import pytest
import typer
from support import error_codes
from support.imports import PACKAGE
from test_layers import ORDER

import qtool
from qtool.conversion import TARGETS
from qtool.engine.sampling_params import SamplingParams
from qtool.formats import FORMATS
from qtool.inspection.engines.rule_inputs import Format
from qtool.options import ExportOptions, field_docs

ROOT = PACKAGE.parent
FOLDERS = {"": "*.md", "docs": "*.md", "qtool": "*.md", "recipes": "*.md", "examples": "**/*.md"}
DOCUMENTS = sorted(
    path for folder, names in FOLDERS.items() for path in (ROOT / folder).glob(names)
)
GENERATED = re.compile(r"(<!-- generated: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
PATH = re.compile(r"`((?:tests|qtool|docs|recipes|examples)/[\w./-]+)[^`]*`")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
MAX_README_BYTES = 6 * 1024


def help_of(command: str) -> str:
    """Return what ``command`` prints at 80 columns, as a block of Markdown."""
    arguments = command.split()[1:]
    done = subprocess.run(
        [sys.executable, "-m", "qtool.cli", *arguments],
        env={**os.environ, "COLUMNS": "80", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    return "\n".join(["```text", *lines, "```"])


def fields_of(name: str) -> str:
    """Return the fields of the dataclass called ``name`` as a table: default and meaning."""
    module, _, kind = name.rpartition(".")
    options = getattr(importlib.import_module(module), kind)
    rows = ["| option | default | meaning |", "|---|---|---|"]
    docs = field_docs(options)
    for field in dataclasses.fields(options):
        rows.append(f"| `{field.name}` | `{field.default!r}` | {docs[field.name]} |")
    return "\n".join(rows).replace("<n>", "N")


def generated(what: str) -> str:
    """Return the text of the block called ``what``."""
    if what == "error codes":
        return error_codes.documented()
    kind, _, name = what.partition(" ")
    return fields_of(name) if kind == "fields" else help_of(what)


def blocks() -> Iterator[tuple[Path, str, str]]:
    """Yield (document, name, text) of every generated block."""
    for path in DOCUMENTS:
        for match in GENERATED.finditer(path.read_text(encoding="utf-8")):
            text = match[0].removeprefix(match[1]).removesuffix(match[3])
            yield path, match[2], text.strip("\n")


def anchors(path: Path) -> set[str]:
    """Return the anchors of the headings of ``path``, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}


def code(path: Path, language: str) -> list[str]:
    """Return the blocks of ``path`` that are marked as ``language``."""
    return [
        text for name, text in FENCE.findall(path.read_text(encoding="utf-8")) if name == language
    ]


def commands(path: Path) -> Iterator[list[str]]:
    """Yield the words of every qtool command in the code blocks of ``path``."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in text.splitlines():
        match = re.match(
            r"(?:\s{4}|\$ |)(?:\S*/)?qtool ((?:quantize|export|inspect|serve)\b.*)", line
        )
        if match:
            ours = match[1].split(" #")[0].split(" -- ")[0]
            yield ours.split()


@cache
def options_of(command: str) -> set[str]:
    """Return the names of the options of ``command``."""
    from qtool.cli.app import app

    found = typer.main.get_command(app).commands[command]  # type: ignore[attr-defined]
    return {name for each in found.params for name in (*each.opts, *each.secondary_opts)} | {
        "--help"
    }


def test_the_readme_is_short():
    assert (ROOT / "README.md").stat().st_size <= MAX_README_BYTES


@pytest.mark.parametrize(
    ("path", "name", "text"),
    blocks(),
    ids=lambda value: value.name if isinstance(value, Path) else "",
)
def test_generated_blocks_say_what_the_program_says(path, name, text):
    assert text == generated(name), "`python tests/test_docs.py` writes it again"


def test_every_command_has_its_help_in_the_documents():
    names = {name for _, name, _ in blocks()}
    assert {f"qtool {each} --help" for each in ("quantize", "export", "inspect", "serve")} <= names
    assert "error codes" in names


def test_every_error_code_says_what_happened():
    silent = [
        code
        for table in error_codes.codes().values()
        for code, entry in table.items()
        if not entry.messages
    ]
    assert silent == [], "give them a message in support/error_codes.py, MEANINGS"


def test_meanings_are_only_of_codes_that_exist():
    known = {code for table in error_codes.codes().values() for code in table}
    assert {name.split()[-1] for name in error_codes.MEANINGS} <= known


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_paths_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    for link in LINK.findall(text):
        if not re.match(r"\w+:", link):
            target, _, anchor = link.partition("#")
            file = (path.parent / target).resolve() if target else path
            assert file.exists(), link
            assert not anchor or anchor in anchors(file), link
    if path.name != "CHANGELOG.md":  # what it names may be gone
        for name in PATH.findall(text):
            assert (ROOT / name).exists(), name


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_and_options_exist(path):
    for name, *words in commands(path):
        given = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        assert given <= options_of(name), name


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_blocks_are_python_and_name_what_qtool_has(path):
    for text in code(path, "python"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "qtool":
                assert hasattr(qtool, node.attr), node.attr


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_targets_of_make_exist(path):
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"(?:^    |`)make (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(named) <= set(targets)


def test_every_sampling_field_and_format_is_documented():
    engine = (ROOT / "docs" / "engine.md").read_text(encoding="utf-8")
    fields = {field.name for field in dataclasses.fields(SamplingParams)}
    assert not {name for name in fields if f"`{name}`" not in engine}
    convert = (ROOT / "docs" / "convert.md").read_text(encoding="utf-8")
    help_text = field_docs(ExportOptions)["to"]
    assert not {name for name in TARGETS if f"`{name}`" not in convert or name not in help_text}
    assert set(get_args(Format)) == set(FORMATS)


def test_the_map_has_every_module_in_the_order_of_imports():
    rows = re.findall(r"^\| `(\w+)/?` \|", (PACKAGE / "README.md").read_text(), re.MULTILINE)
    there = [
        name for name in ORDER if (PACKAGE / name).exists() or (PACKAGE / f"{name}.py").exists()
    ]
    assert [name for name in rows if name in there] == there


def write() -> None:
    """Write every generated block again."""
    for path in DOCUMENTS:
        old = path.read_text(encoding="utf-8")
        new = GENERATED.sub(lambda match: f"{match[1]}{generated(match[2])}\n{match[3]}", old)
        if new != old:
            path.write_text(new, encoding="utf-8")
            print(f"written: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    write()
