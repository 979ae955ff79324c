"""What is known of a style of tool calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qtool.serve.api.fields import Json
from qtool.serve.api.protocol import Tool
from qtool.serve.api.tools.deltas import ToolParser

NAME = "%NAME%"


@dataclass(frozen=True, slots=True, kw_only=True)
class CallForm:
    """How calls are written in a style, for answers that must call a tool."""

    before: str = ""
    """Before the first call."""

    begin: str
    """Before the arguments of each; `NAME` stands for the name of the function."""

    end: str
    """After the arguments of each."""

    numbered: str = ""
    """After ``begin`` comes a number, and then this, if it is not empty."""

    between: str
    after: str = ""
    """After the last call."""

    arguments: str = "json"
    """The style of arguments, as xgrammar's structural tags name it."""

    def tag(self, tools: Sequence[tuple[str, Json]], *, parallel: bool) -> Json:
        """Return the structural tag of an answer that calls one of ``tools``, or several of them
        if ``parallel``; they are names and schemas of arguments.
        """
        calls = self._calls(tools, parallel=parallel)
        parts = [_const(self.before), calls, _const(self.after)]
        elements = [part for part in parts if part is not None]
        return {
            "type": "structural_tag",
            "format": {"type": "sequence", "elements": elements} if elements[1:] else calls,
        }

    def optional_tag(
        self, tools: Sequence[tuple[str, Json]], markers: Sequence[str], *, parallel: bool
    ) -> Json | None:
        """Return the structural tag of an answer that may hold text and calls, whose arguments
        satisfy the schemas; None if nothing but ``markers`` could tell a call from text and no call
        begins with one.
        """
        begin = self.before or self.begin.partition(NAME)[0]
        triggers = [marker for marker in markers if begin.startswith(marker)]
        if not triggers:
            return None
        tags = self._tags(tools)
        if self.before:
            calls = self._calls(tools, parallel=parallel)
            tags = [{"type": "tag", "begin": self.before, "content": calls, "end": self.after}]
        return {
            "type": "structural_tag",
            "format": {
                "type": "triggered_tags",
                "triggers": triggers[:1],
                "tags": tags,
                "stop_after_first": not parallel,
            },
        }

    def _calls(self, tools: Sequence[tuple[str, Json]], *, parallel: bool) -> Json:
        return {
            "type": "tags_with_separator",
            "tags": self._tags(tools),
            "separator": self.between,
            "at_least_one": True,
            "stop_after_first": not parallel,
        }

    def _tags(self, tools: Sequence[tuple[str, Json]]) -> list[Json]:
        return [
            {
                "type": "tag",
                "begin": self.begin.replace(NAME, name),
                "content": self._arguments(schema),
                "end": self.end,
            }
            for name, schema in tools
        ]

    def _arguments(self, schema: Json) -> Json:
        arguments: Json = {"type": "json_schema", "json_schema": schema, "style": self.arguments}
        if not self.numbered:
            return arguments
        number = {"type": "regex", "pattern": r"\d{1,3}"}
        return {"type": "sequence", "elements": [number, _const(self.numbered), arguments]}


def json_array(start: str, end: str = "") -> CallForm:
    """Return the form ``[{"name": ..., "arguments": ...}, ...]`` between two markers."""
    return CallForm(
        before=f"{start}[",
        begin=f'{{"name": "{NAME}", "arguments": ',
        end="}",
        between=", ",
        after=f"]{end}",
    )


def _const(text: str) -> Json | None:
    return {"type": "const_string", "value": text} if text else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolStyle:
    """A style of tool calls; each stands in a file of its own."""

    make_parser: Callable[[Sequence[Tool]], ToolParser]
    """Returns the parser of one answer that may call these tools."""

    shows: Callable[[str], bool]
    """Whether a chat template teaches it."""

    markers: tuple[str, ...] = ()
    """What may be special tokens, and must reach the parser."""

    form: CallForm | None = None
    """How forced calls are written; None: as JSON that a schema holds."""
