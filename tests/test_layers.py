"""The reading order is the import order, and what should answer at once imports nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.imports import PACKAGE, imports_of

ORDER = (
    *(
        "errors",
        "sandbox",
        "terminal",
        "sizes",
        "memory",
        "imports",
        "devices",
        "events",
        "scheme",
        "patterns",
        "strict_yaml",
        "checkpoint",
        "modules",
        "name_map",
        "recipe",
        "options",
        "plan",
        "codes",
        "weight",
        "formats",
        "architecture",
        "inspection",
        "calibration",
        "backends",
        "quantization",
    ),
    *("conversion", "runtime", "engine", "evaluation", "serve", "cli"),
)
FILES = {
    str(path.relative_to(PACKAGE)): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py"
}
HEAVY = {
    "torch",
    "transformers",
    "datasets",
    "gptqmodel",
    "llmcompressor",
    "modelopt",
    "compressed_tensors",
    "torchao",
    "triton",
}


def layer_of(file: str) -> str:
    return Path(file).parts[0].removesuffix(".py")


def layers_imported_by(path: Path) -> set[str]:
    names = {f"qtool.{name}" if module == "qtool" else module for module, name in imports_of(path)}
    return {name.split(".")[1] for name in names if name.startswith("qtool.")} - {"__version__"}


def test_every_file_belongs_to_a_layer():
    assert {layer_of(file) for file in FILES} <= set(ORDER)


@pytest.mark.parametrize("file", FILES)
def test_a_module_imports_only_from_its_left(file):
    layer = layer_of(file)
    allowed = {layer, *ORDER[: ORDER.index(layer)]}
    if layer in ("runtime", "engine", "serve"):
        # a server needs no quantization library
        allowed -= {
            "backends",
            "quantization",
            "conversion",
        }
    assert layers_imported_by(FILES[file]) <= allowed


def test_an_import_inside_a_function_is_seen(tmp_path):
    file = PACKAGE / "formats" / "__init__.py"
    assert "weight" in layers_imported_by(file)  # it is imported in functions and for types only


COMMANDS = {
    "help": ["--help"],
    "help of quantize": ["quantize", "--help"],
    "list": ["quantize", "--list", "--all"],
    "dry run": ["quantize", "--model-path", "MODEL", "--method", "modelopt_fp8", "--dry-run"],
    "refusal": ["quantize", "--model-path", "MODEL", "--method", "modelopt_fp9"],
    "inspect": ["inspect", "--model-path", "MODEL"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_what_reads_headers_imports_no_library(name, tiny_model, tmp_path):
    arguments = [
        str(tiny_model) if argument == "MODEL" else argument for argument in COMMANDS[name]
    ]
    command = [sys.executable, "-X", "importtime", "-m", "qtool.cli", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == (2 if name == "refusal" else 0), done.stderr[-500:]
    imported = {
        line.rsplit("|", 1)[1].strip().split(".")[0]
        for line in done.stderr.splitlines()
        if line.startswith("import time:")
    }
    assert "qtool" in imported
    assert not imported & HEAVY
