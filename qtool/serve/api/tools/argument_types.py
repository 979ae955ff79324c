"""The JSON values of arguments that models write as text, by the schema of the tool."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Iterator, Mapping, Sequence

from qtool.serve.api.protocol import Tool

MAX_LITERAL = 1 << 16  # characters of a value that is read as Python
_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "array": list,
    "object": dict,
    "null": type(None),
}


def schemas_by_name(tools: Sequence[Tool]) -> dict[str, Mapping[str, object]]:
    """Return for each tool the schemas of its arguments by name; references are followed."""
    found: dict[str, Mapping[str, object]] = {}
    for tool in tools:
        parameters = tool.function.parameters or {}
        properties = parameters.get("properties")
        named = properties if isinstance(properties, dict) else {}
        found[tool.function.name] = {
            name: _resolved(schema, parameters) for name, schema in named.items()
        }
    return found


def is_text(schema: object) -> bool:
    """Whether an argument is a string, and nothing else, by its ``schema``."""
    return set(_types(schema)) == {"string"}


def parse_argument(text: str, schema: object) -> object:
    """Return the value that a model means by ``text``: JSON or a Python literal of one of the types
    of ``schema``, else the text itself.
    """
    value = parse_literal(text)
    types = set(_types(schema))
    if isinstance(value, str) and not types - {"string"}:
        return text
    if not types or any(_is_of(value, name) for name in types):
        return value
    return text if "string" in types or value is None else value


def parse_literal(text: str) -> object:
    """Return the value of ``text``, JSON or a Python literal; ``text`` where it is neither."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = _parse_python(text)
    return value if _is_json(value) else text


def _parse_python(text: str) -> object:
    """Return the value of a Python literal, such as True or {'a': 1}; the text where it is none."""
    if len(text) > MAX_LITERAL:
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return text


def _is_json(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _is_of(value: object, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    return isinstance(value, _TYPES.get(name, object))


def _types(schema: object) -> Iterator[str]:
    """Yield the types that ``schema`` allows, as far as it names them."""
    if not isinstance(schema, Mapping):
        return
    types = schema.get("type")
    for name in types if isinstance(types, list) else [types]:
        if isinstance(name, str) and name in _TYPES:
            yield name
    for key in ("anyOf", "oneOf", "allOf"):
        parts = schema.get(key)
        for part in parts if isinstance(parts, list) else ():
            if isinstance(part, Mapping) and isinstance(part.get("type"), str):
                yield str(part["type"])
    values = schema.get("enum", [schema["const"]] if "const" in schema else [])
    if types is None and isinstance(values, list):
        yield from (name for name in _TYPES if any(_is_of(value, name) for value in values))


def _resolved(schema: object, root: Mapping[str, object]) -> object:
    """Return what a reference such as ``#/$defs/Name`` stands for, else ``schema``."""
    reference = schema.get("$ref") if isinstance(schema, Mapping) else None
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return schema
    found: object = root
    for part in reference[2:].split("/"):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found
