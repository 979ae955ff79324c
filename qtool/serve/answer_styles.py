"""In which styles the served model writes thoughts and tool calls: as options say, or as its chat
template shows.
"""

from __future__ import annotations

import logging

from qtool.serve.api.reasoning import styles as reasoning_styles
from qtool.serve.api.tools import styles as tool_styles
from qtool.serve.prompts.templates import Templates
from qtool.serve.settings import ServeSettings

LOG = logging.getLogger("qtool.serve")


def tool_style(settings: ServeSettings, templates: Templates) -> str | None:
    """Return the style of tool calls, and log it; None if they are left in the content."""
    template = templates.template
    if template is not None and not template.accepts_tools:
        LOG.info(
            "the chat template does not show tools to the model: it calls them only if it must"
        )
    named = settings.tool_call_parser
    if named != "auto":
        style = tool_styles.style_named(named)
        _log("tool calls", style, "--tool-call-parser")
        return style
    # of a tokenizer with several templates, a named one shows tools
    style = tool_styles.detect(None if template is None else template.tool_text)
    _log("tool calls", style, None)
    return style


def reasoning_style(settings: ServeSettings, templates: Templates) -> str | None:
    """Return the style of thoughts, and log it; None if they are left in the content."""
    named = settings.reasoning_parser
    if named != "auto":
        style = reasoning_styles.style_named(named)
        _log("thoughts", style, "--reasoning-parser")
        return style
    style = reasoning_styles.detect(templates.text)
    _log("thoughts", style, None)
    return style


def _log(what: str, style: str | None, option: str | None) -> None:
    """Log how the model writes ``what``; ``option`` is the one that says it."""
    if option is not None:
        LOG.info("%s: %s, by %s", what, style or "left in the content", option)
    elif style is not None:
        LOG.info("%s: read in the style %s, which the chat template shows", what, style)
    else:
        LOG.info("%s: the chat template shows no style that is known; none are read", what)
