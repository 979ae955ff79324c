"""The tools of a request as functions: a model calls functions, and clients get back what they
defined.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from qtool.errors import UsageError
from qtool.serve.api.conversation import function_tool
from qtool.serve.api.fields import MAX_AGENT_TOOLS
from qtool.serve.api.other_fields import log_once
from qtool.serve.api.protocol import (
    Allowed,
    AllowedTools,
    FunctionName,
    NamedTool,
)
from qtool.serve.api.protocol import Tool as ChatTool
from qtool.serve.api.responses import custom_input
from qtool.serve.api.responses.protocol import (
    ChosenTool,
    CustomTool,
    FunctionTool,
    NamespaceTool,
    OtherTool,
    Tool,
)

ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedTools


@dataclass(frozen=True)
class CalledTool:
    """What the client calls a function of the model's."""

    name: str

    namespace: str | None = None

    is_custom: bool = False
    """Whether its input is a text."""


class ToolTable:
    """The functions that stand for the tools of a request."""

    def __init__(self, tools: Iterable[Tool]) -> None:
        self.functions: list[ChatTool] = []
        """Those to show to the model."""
        self._called: dict[str, CalledTool] = {}
        for tool in tools:
            if isinstance(tool, NamespaceTool):
                for own in tool.tools:
                    self._add(own, tool.name)
            else:
                self._add(tool, None)

    def called(self, function: str) -> CalledTool:
        """Return what the client calls the function of that name."""
        return self._called.get(function) or CalledTool(function)

    def choice(self, choice: str | ChosenTool | None) -> ToolChoice | None:
        """Return a request's ``tool_choice`` in terms of functions. Raises: UsageError."""
        match choice:
            case None | "none" | "auto" | "required":
                return choice
            case ChosenTool(type="allowed_tools"):
                tools = [self._named(tool) for tool in choice.tools or ()]
                allowed = Allowed.model_construct(mode=choice.mode or "auto", tools=tools)
                return AllowedTools.model_construct(type="allowed_tools", allowed_tools=allowed)
            case ChosenTool():
                return self._named(choice)
        raise AssertionError(choice)

    def _add(self, tool: FunctionTool | CustomTool | OtherTool, namespace: str | None) -> None:
        if isinstance(tool, OtherTool):
            log_once("tools of type `%s` are left out: this server runs no tools", tool.type)
            return
        if len(self.functions) == MAX_AGENT_TOOLS:
            raise UsageError(
                "E_TOOLS",
                f"the namespaces have more than {MAX_AGENT_TOOLS} tools together",
                hint="send fewer",
            )
        name = function_name(tool.name, namespace)
        is_custom = isinstance(tool, CustomTool)
        self._called[name] = CalledTool(tool.name, namespace, is_custom)
        parameters, strict = custom_input.SCHEMA, None
        if isinstance(tool, FunctionTool):
            parameters, strict = tool.parameters or {}, tool.strict
        self.functions.append(function_tool(name, _description(tool), parameters, strict))

    def _named(self, choice: ChosenTool) -> NamedTool:
        if choice.type not in ("function", "custom") or choice.name is None:
            raise UsageError(
                "E_TOOLS",
                f"tool_choice asks for a tool of type `{choice.type[:100]}`, and this server runs "
                "no tools",
                hint="name a function or a custom tool",
            )
        name = function_name(choice.name, choice.namespace)
        function = FunctionName.model_construct(name=name)
        return NamedTool.model_construct(type="function", function=function)


def function_name(name: str, namespace: str | None) -> str:
    """Return the name of the function that stands for a tool."""
    if not namespace:
        return name
    return f"{namespace}{name}" if namespace.endswith("__") else f"{namespace}__{name}"


def _description(tool: FunctionTool | CustomTool) -> str | None:
    """Return what the model is told of ``tool``, the form of a custom input included."""
    if isinstance(tool, FunctionTool) or tool.format is None or not tool.format.definition:
        return tool.description
    form = f"The input follows this grammar ({tool.format.syntax}):\n{tool.format.definition}"
    return f"{tool.description}\n\n{form}" if tool.description else form
