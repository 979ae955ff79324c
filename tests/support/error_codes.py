"""Every error code of the package with its exit code, its messages and its hints, read from the
source: `documented` returns them as the tables of docs/errors.md.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import yaml

from qtool import errors
from support.imports import PACKAGE

CODE = re.compile(r"E_[A-Z0-9_]+")
ENGINE_CODE = re.compile(r"[EWN]_ENGINE_[A-Z0-9_]+")
ENGINES = PACKAGE / "inspection" / "engines"
MESSAGES_SHOWN = 3  # of one code; the others are variants
CLASSES = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, errors.QtoolError)
}
HEADINGS = {  # class -> heading of its table, in the order of the page
    "UsageError": "The command line, a Python argument or a request is wrong (exit code 2)",
    "CheckpointRefused": "The checkpoint cannot be used (exit code 3)",
    "RecipeRefused": "The recipe, or what it asks of this model, cannot be done (exit code 3)",
    "DataRefused": "The calibration or evaluation data cannot be used (exit code 3)",
    "StateRefused": "The saved ModelOpt state cannot be used (exit code 3)",
    "ResourceError": "Disk, memory, device, network or a package is missing (exit code 4)",
    "BackendFailed": "A library failed on input that qtool had accepted (exit code 5)",
    "OutputTaken": "The output exists or is in use (exit code 6)",
    "QtoolError": "A bug in qtool (exit code 1)",
    "Interruption": "A signal ended the command (exit code 129, 130 or 143)",
}
TABLES_OF_CODES = {  # package -> class of the errors whose codes stand in its tables
    "checkpoint": "CheckpointRefused",
    "formats": "CheckpointRefused",
}
MEANINGS = {
    "E_ADAPTER": "the LoRA adapter is of another model, damaged, or changes it in a way that is not merged",  # of codes whose messages do not tell it here; "Class CODE" where two classes share it
    "E_ATTENTION_SHAPE": "a projection of the attention has a shape that config.json excludes",
    "E_EMBEDDING_SHAPE": "the embeddings have a shape that config.json excludes",
    "E_MLP_SHAPE": "a projection of the MLP has a shape that config.json excludes",
    "E_NORM_SHAPE": "a norm has a shape that config.json excludes",
    "E_BACKEND_DIED": "the library's process ended without a result, and without saying why",
    "E_BACKEND_FAILED": "the library raised an error; the message names it, its version and its log",
    "E_DATA_MISSING": "the calibration file is not there or cannot be read",
    "E_ENGINE_REFUSES": "vLLM or SGLang does not load this checkpoint; the message says why",
    "E_GGUF": "the weights are a GGUF file, and only safetensors can be used here",
    "E_GGUF_EXPERTS": "the experts of a layer are missing, too many or not alike, so they cannot be stacked",
    "E_PATTERN": "a pattern of the recipe or of --ignore matches no linear module of this model, is "
    "not a regular expression, or takes too much time or memory",
    "E_QUANT_PATTERN": "a pattern of the quantization config is not a regular expression, or takes "
    "too much time or memory",
    "E_HEADER_SIZE": "a tensor is given more or fewer bytes than its shape and dtype need",
    "E_INDEX_PATH": "the index names a file outside of the model folder",
    "E_INDEX_TYPE": "the index maps a tensor to something that is not a file name",
    "E_LFS_POINTER": "a file is a Git LFS pointer, not the file itself",
    "E_INTERRUPTED": "SIGHUP, SIGINT or SIGTERM came; the message names what was published before",
    "E_LIMIT": "a number is out of its bounds",
    "E_NOT_SAFETENSORS": "a .safetensors file is something else, for example an HTML page",
    "E_PICKLE": "the weights are pickle files, perhaps under another name; qtool never opens them",
    "E_QUANT_CONFIG": "the quantization config has keys or values that its format does not have",
    "E_OVERLAP": "two tensors of a file overlap",
    "E_HOLE": "a file has bytes between two tensors that belong to neither",
    "E_VALUES": "the weights have values that cannot be converted, such as NaN",
    "E_WEIGHT_SHAPE": "the stored shape of a packed weight does not fit its tensor",
    "E_G_IDX_LENGTH": "g_idx does not have one entry for each input",
    "E_SCALE_SHAPE": "the scales of a layer do not have the shape that its scheme asks for",
    "E_ZERO_SHAPE": "the zero points of a layer do not have the shape that its scheme asks for",
    "E_TENSOR_SHAPE": "a tensor of a quantized layer does not have its scheme's shape",
    "E_TENSOR_DTYPE": "a tensor of a quantized layer does not have its scheme's dtype",
    "E_EFFECTIVE_BITS": "the recipe's `effective_bits` cannot be reached",
    "QtoolError E_VERIFY": "a converted checkpoint does not read back as it was planned",
    "E_SCHEME": "a scheme is written wrongly, or holds what no format can",
}


@dataclass(frozen=True)
class Use:
    """One place in the source that names a code."""

    code: str
    class_name: str
    message: str
    hint: str


@dataclass
class Entry:
    """A code as the page shows it."""

    messages: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)

    def add(self, message: str, hint: str) -> None:
        """Add what one place says, unless it is there."""
        if message and message not in self.messages:
            self.messages.append(message)
        if hint and hint not in self.hints:
            self.hints.append(hint)


class _Module:
    """The source of one module, and how to find texts in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tree = ast.parse(path.read_text(encoding="utf-8"))
        self.parents = {
            child: node for node in ast.walk(self.tree) for child in ast.iter_child_nodes(node)
        }

    def codes(self) -> Iterator[ast.Constant]:
        """Yield the constants that are an error code."""
        for node in ast.walk(self.tree):
            is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
            if is_text and CODE.fullmatch(node.value) and not self._is_looked_up(node):
                yield node

    def _is_looked_up(self, node: ast.AST) -> bool:
        parent = self.parents[node]
        return isinstance(parent, ast.Compare | ast.Dict | ast.Set | ast.Subscript) or (
            isinstance(parent, ast.Tuple | ast.Set)
            and isinstance(self.parents[parent], ast.Compare)
        )

    def text(self, node: ast.AST | None, depth: int = 0) -> str:
        """Return the text that ``node`` stands for, `…` in place of what is known only later."""
        if node is None or depth > 4:
            return ""
        if isinstance(node, ast.Constant):
            return node.value if isinstance(node.value, str) else ""
        if isinstance(node, ast.JoinedStr):
            return "".join(self.text(part, depth + 1) for part in node.values)
        if isinstance(node, ast.FormattedValue):
            return "…"
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return self.text(node.left, depth + 1) + self.text(node.right, depth + 1)
        if isinstance(node, ast.IfExp):
            return self.text(node.body, depth + 1) or self.text(node.orelse, depth + 1)
        if isinstance(node, ast.BoolOp):
            return next(filter(None, (self.text(v, depth + 1) for v in node.values)), "")
        if isinstance(node, ast.Name):
            return self.text(self._assigned(node), depth + 1)
        return ""

    def _assigned(self, name: ast.Name) -> ast.AST | None:
        """Return the value last assigned to ``name`` above it, in its function or in the module."""
        found: ast.AST | None = None
        for node in ast.walk(self._function_of(name)):
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.lineno < name.lineno:
                found = _value_for(node, name.id) or found
        if found is None:
            for node in self.tree.body:
                if isinstance(node, ast.Assign | ast.AnnAssign):
                    found = _value_for(node, name.id) or found
        return found

    def _function_of(self, node: ast.AST) -> ast.AST:
        while node in self.parents and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node = self.parents[node]
        return node


def _value_for(node: ast.Assign | ast.AnnAssign, name: str) -> ast.AST | None:
    """Return what the statement assigns to ``name``; None when it assigns to others."""
    for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
        if isinstance(target, ast.Name) and target.id == name:
            return node.value
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            for each, value in zip(target.elts, node.value.elts, strict=False):
                if isinstance(each, ast.Name) and each.id == name:
                    return value
    return None


@cache
def uses() -> list[Use]:
    """Return every place of the package that names an error code."""
    modules = [_Module(path) for path in sorted(PACKAGE.rglob("*.py"))]
    helpers = {  # function -> class of the error that it makes
        node.name: made
        for module in modules
        for node in ast.walk(module.tree)
        if isinstance(node, ast.FunctionDef) and (made := _class_made_in(node))
    }
    return [_use(module, node, helpers) for module in modules for node in module.codes()]


def _class_made_in(function: ast.FunctionDef) -> str:
    named = ast.unparse(function.returns) if function.returns else ""
    if named in CLASSES:
        made = {
            node.func.id
            for node in ast.walk(function)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        return min(made & CLASSES.keys(), default=named)
    return ""


def _use(module: _Module, node: ast.Constant, helpers: dict[str, str]) -> Use:
    parent = module.parents[node]
    texts: list[str] = []
    hint = ""
    class_name = ""
    if isinstance(parent, ast.Call):
        name = ast.unparse(parent.func).rpartition(".")[2]
        class_name = name if name in CLASSES else helpers.get(name, "")
        position = parent.args.index(node) if node in parent.args else -1
        texts = [module.text(argument) for argument in parent.args[position + 1 :]]
        named = {word.arg: module.text(word.value) for word in parent.keywords}
        hint = named.get("hint", "")
        texts += [named[word] for word in ("message",) if word in named]
    elif isinstance(parent, ast.Tuple):
        texts = [module.text(each) for each in parent.elts[parent.elts.index(node) + 1 :]]
    texts = [text for text in texts if " " in text.strip()]  # a message has words
    if not hint and len(texts) > 1:
        hint = texts[1]
    package = module.path.relative_to(PACKAGE).parts[0]
    class_name = class_name or TABLES_OF_CODES.get(package, "")
    code = str(node.value)
    assert class_name, f"{module.path}:{node.lineno}: which class of errors has {code}?"
    return Use(code, class_name, texts[0] if texts else "", hint)


def codes() -> dict[str, dict[str, Entry]]:
    """Return class name -> code -> what the page says of it."""
    tables: dict[str, dict[str, Entry]] = {name: {} for name in HEADINGS}
    for use in uses():
        class_name = use.class_name if use.class_name in tables else "QtoolError"
        tables[class_name].setdefault(use.code, Entry()).add(use.message, use.hint)
    for class_name, table in tables.items():
        for code, entry in table.items():
            meaning = MEANINGS.get(f"{class_name} {code}") or MEANINGS.get(code)
            if meaning:
                entry.messages = [meaning]
    return tables


def engine_findings() -> dict[str, tuple[list[str], Entry]]:
    """Return code -> the engines that it is found for, and what the page says of it."""
    found: dict[str, tuple[list[str], Entry]] = {}
    for path in sorted(ENGINES.glob("*.yaml")):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        rules = content.get("rules", []) if isinstance(content, dict) else content
        for rule in rules if isinstance(rules, list) else []:
            if isinstance(rule, dict) and ENGINE_CODE.fullmatch(str(rule.get("code", ""))):
                names, entry = found.setdefault(rule["code"], ([], Entry()))
                if path.stem not in names:
                    names.append(path.stem)
                entry.add(re.sub(r"\{\w+\}", "…", rule["message"]), rule.get("hint", ""))
    return found


def documented() -> str:
    """Return the generated part of docs/errors.md."""
    parts = []
    for class_name, table in codes().items():
        if table:
            rows = [_row(f"`{code}`", table[code]) for code in sorted(table)]
            parts.append(_table(HEADINGS[class_name], "code", rows))
    rows = []
    for code, (names, entry) in sorted(engine_findings().items()):
        shown = "all" if names == ["fusion"] else ", ".join(names)
        rows.append(_row(f"`{code}` ({shown})", entry))
    parts.append(_table("Findings of `qtool inspect --engine`", "code (engines)", rows))
    return "\n\n".join(parts)


def _table(heading: str, first: str, rows: list[str]) -> str:
    head = f"| {first} | what happened | what to try |\n|---|---|---|"
    return "\n".join([f"## {heading}", "", head, *rows])


def _row(first: str, entry: Entry) -> str:
    return f"| {first} | {_cell(entry.messages)} | {_cell(entry.hints)} |"


def _cell(texts: list[str]) -> str:
    shown = [_escaped(" ".join(text.split())) for text in texts[:MESSAGES_SHOWN]]
    return "<br>".join([*shown, *(["…"] if len(texts) > MESSAGES_SHOWN else [])])


def _escaped(text: str) -> str:
    """Return ``text`` for a cell of a table: `<` is only markup outside of code spans."""
    parts = text.replace("|", "\\|").split("`")
    return "`".join([part if i % 2 else part.replace("<", "&lt;") for i, part in enumerate(parts)])
