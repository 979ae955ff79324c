"""What a request lets the model call, and the JSON schema that forces a call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from qtool.errors import UsageError, nearest
from qtool.serve.api.fields import Json
from qtool.serve.api.other_fields import log_once
from qtool.serve.api.protocol import AllowedTools, NamedTool, Tool

ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedTools
_SCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_DATA = ("const", "enum", "default", "examples")


@dataclass(frozen=True, slots=True)
class Choice:
    """What a request lets the model call."""

    mode: Literal["none", "auto", "required", "named"]
    tools: tuple[Tool, ...]
    """The tools that may be called: the ones to show to the template."""

    is_held: bool = True
    """Whether calls of ``strict`` tools can be held to their schemas."""

    @property
    def is_strict(self) -> bool:
        """Whether the model may call tools, and calls are to be held to their schemas."""
        return (
            self.is_held
            and self.mode == "auto"
            and any(tool.function.strict for tool in self.tools)
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the functions that may be called."""
        return tuple(tool.function.name for tool in self.tools)


def log_not_held(reason: str) -> None:
    """Log, once for each ``reason``, why calls of strict tools are not held to their schemas."""
    log_once("calls of `strict` tools are not held to their schemas (%s)", reason)


def choose(tools: Sequence[Tool] | None, tool_choice: ToolChoice | None) -> Choice:
    """Return what ``tool_choice`` means for ``tools``; both are fields of a request.

    Without a tool_choice it is ``auto`` if there are tools. Allowed tools become the only ones.
    Raises: UsageError, if two tools share a name or the choice names a tool that is missing.
    """
    tools = tuple(tools or ())
    _check_unique_names(tools)
    match tool_choice:
        case NamedTool():
            return Choice("named", _find_tools([tool_choice], tools))
        case AllowedTools():
            allowed = tool_choice.allowed_tools
            return _choose_mode(allowed.mode, _find_tools(allowed.tools, tools))
    return _choose_mode(tool_choice or "auto", tools)


def schema_for(choice: Choice, *, parallel: bool = True) -> Json | None:
    """Return the JSON schema of an answer that consists of the requested call; None if the model
    may answer freely.

    A named function: the schema of its arguments. Required: an array of ``{"name", "parameters"}``,
    with one item if not ``parallel``.
    Raises: UsageError, if a schema is nested too deeply to copy.
    """
    if choice.mode == "named":
        return dict(parameters(choice.tools[0]))
    if choice.mode != "required":
        return None
    try:
        # References in a schema start at its root, which is now below `$defs`. Names contain
        # neither / nor ~, so they need no escapes.
        definitions = {
            tool.function.name: _rebase(parameters(tool), f"#/$defs/{tool.function.name}")
            for tool in choice.tools
        }
    except RecursionError as error:
        raise UsageError(
            "E_TOOLS", "the parameters of a tool are nested too deeply", hint="use $defs and $ref"
        ) from error
    calls = [_call_schema(name) for name in choice.names]
    schema: Json = {
        "type": "array",
        "minItems": 1,
        "items": {"anyOf": calls},
        "$defs": definitions,
    }
    return schema if parallel else {**schema, "maxItems": 1}


def _check_unique_names(tools: Sequence[Tool]) -> None:
    seen = set()
    for position, tool in enumerate(tools):
        name = tool.function.name
        if name in seen:
            raise UsageError(
                "E_TOOLS",
                f"tools[{position}].function.name `{name}` is there twice",
                hint="give each function a name of its own",
            )
        seen.add(name)


def _choose_mode(mode: Literal["none", "auto", "required"], tools: tuple[Tool, ...]) -> Choice:
    if mode == "required" and not tools:
        raise UsageError(
            "E_TOOLS",
            'tool_choice is "required" and there are no tools',
            hint="send `tools`, or leave tool_choice out",
        )
    if mode == "none" or not tools:
        return Choice("none", ())
    return Choice(mode, tools)


def _find_tools(wanted: Iterable[NamedTool], tools: Sequence[Tool]) -> tuple[Tool, ...]:
    """Return the tools that ``wanted`` names, each once. Raises: UsageError, if one is missing."""
    by_name = {tool.function.name: tool for tool in tools}
    names = dict.fromkeys(one.function.name for one in wanted)
    for name in names:
        if name not in by_name:
            raise UsageError(
                "E_TOOLS",
                f"tool_choice names {name!r}, which is not among the tools",
                hint=nearest(name, by_name) or _list_tools(by_name),
            )
    return tuple(by_name[name] for name in names)


def _list_tools(names: Iterable[str]) -> str:
    shown = ", ".join(list(names)[:8])
    return f"the tools are {shown}" if shown else "send `tools`"


def parameters(tool: Tool) -> Json:
    """Return the schema of a function's arguments; without one it takes none, says OpenAI."""
    return tool.function.parameters or {"type": "object", "properties": {}}


def _call_schema(name: str) -> Json:
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "parameters": {"$ref": f"#/$defs/{name}"}},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


def _rebase(schema: object, root: str) -> object:
    """Copy a JSON schema so that its references into itself go through ``root``, its place in a
    larger schema.
    """
    if isinstance(schema, list):
        return [_rebase(item, root) for item in schema]
    if not isinstance(schema, dict):
        return schema
    copy: Json = {}
    for key, value in schema.items():
        if _is_own_reference(key, value):
            copy[key] = root + value[1:]
        elif _holds_schemas_by_name(key, value):
            copy[key] = {name: _rebase(part, root) for name, part in value.items()}
        else:
            copy[key] = value if key in _DATA else _rebase(value, root)
    return copy


def _holds_schemas_by_name(key: str, value: object) -> bool:
    return key in _SCHEMAS_BY_NAME and isinstance(value, dict)


def _is_own_reference(key: str, value: object) -> bool:
    return key == "$ref" and isinstance(value, str) and value.startswith("#")
