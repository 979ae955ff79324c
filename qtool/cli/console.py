"""The console that tables and progress bars are drawn on."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console, JustifyMethod, OverflowMethod
from rich.style import Style
from rich.text import Text

from qtool.terminal import printable


class EscapingConsole(Console):
    """A console that prints strings as they are: without markup, emoji, line breaks or control
    characters. Only a `Text` has styles and lines.
    """

    def render_str(
        self,
        text: str,
        *,
        style: str | Style = "",
        justify: JustifyMethod | None = None,
        overflow: OverflowMethod | None = None,
        emoji: bool | None = None,
        markup: bool | None = None,
        highlight: bool | None = None,
        highlighter: Callable[[str | Text], Text] | None = None,
    ) -> Text:
        """Return ``text`` escaped; rich calls this method for every string."""
        return super().render_str(
            printable(text),
            style=style,
            justify=justify,
            overflow=overflow,
            emoji=False,
            markup=False,
            highlight=highlight,
            highlighter=highlighter,
        )
