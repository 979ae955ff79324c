"""Which parser reads the tool calls of an answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from qtool.serve.api.tools.choice import Choice
from qtool.serve.api.tools.deltas import ToolParser
from qtool.serve.api.tools.forced import NamedParser, RequiredParser
from qtool.serve.api.tools.hermes import HermesParser
from qtool.serve.api.tools.llama import LlamaParser

# One for each style: from the names of the tools to the parser of an answer.
PARSERS: Mapping[str, Callable[[Iterable[str]], ToolParser]] = {
    "hermes": lambda tool_names: HermesParser(),
    "llama3_json": LlamaParser,
}


def parser_for(choice: Choice, style: str | None) -> ToolParser | None:
    """Return the parser of one answer; None if all of it is content.

    Args:
        choice: what the request lets the model call; if it forces a call, `schema_for` gives the
            form of the answer.
        style: how the model writes calls in a free answer.
    """
    if choice.mode == "named":
        return NamedParser(choice.names[0])
    if choice.mode == "required":
        return RequiredParser()
    if choice.mode == "auto" and style is not None:
        return make_parser(style, choice.names)
    return None


def make_parser(style: str, tool_names: Iterable[str]) -> ToolParser:
    """Return a parser of free answers in ``style``, one of the values of `STYLES`."""
    return PARSERS[style](tool_names)
