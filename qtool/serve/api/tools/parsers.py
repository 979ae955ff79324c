"""Which parser reads the tool calls of an answer."""

from __future__ import annotations

from collections.abc import Sequence

from qtool.serve.api.fields import Json
from qtool.serve.api.protocol import Tool
from qtool.serve.api.tools.choice import Choice, parameters
from qtool.serve.api.tools.deltas import ToolParser
from qtool.serve.api.tools.forced import NamedParser, RequiredParser
from qtool.serve.api.tools.style import CallForm
from qtool.serve.api.tools.styles import STYLES


def parser_for(choice: Choice, style: str | None) -> ToolParser | None:
    """Return the parser of one answer; None if all of it is content.

    Args:
        choice: what the request lets the model call.
        style: how the model writes calls; None if it does not.
    """
    if choice.mode == "none":
        return None
    form = _form_of(style)
    if style is not None and (choice.mode == "auto" or form is not None):
        return make_parser(style, choice.tools)
    if choice.mode == "named":
        return NamedParser(choice.names[0])
    return RequiredParser() if choice.mode == "required" else None


def make_parser(style: str, tools: Sequence[Tool]) -> ToolParser:
    """Return a parser of answers in ``style``, one of `STYLES`."""
    return STYLES[style].make_parser(tools)


def tool_markers(choice: Choice, style: str | None) -> tuple[str, ...]:
    """Return the markers of calls that may be special tokens; none if there can be no calls."""
    if style is None or choice.mode == "none":
        return ()
    return STYLES[style].markers


def _form_of(style: str | None) -> CallForm | None:
    return None if style is None else STYLES[style].form


def call_tag(choice: Choice, style: str | None, *, parallel: bool) -> Json | None:
    """Return the structural tag of an answer that must call a tool in the model's own style, or may
    call ``strict`` ones; None if there are none, or the style cannot be held.
    """
    form = _form_of(style)
    tools = [(tool.function.name, dict(parameters(tool))) for tool in choice.tools]
    tag = None
    if form is not None and choice.mode in ("required", "named"):
        tag = form.tag(tools, parallel=parallel and choice.mode == "required")
    elif form is not None and choice.is_strict:
        tag = form.optional_tag(tools, tool_markers(choice, style), parallel=parallel)
    return tag
