"""Answers of gpt-oss in harmony's format: thoughts, content and calls are messages in channels.

The package `openai-harmony` parses it too, but its encodings need a vocabulary that it downloads;
a server without network reads the text itself.
Source: https://github.com/openai/harmony, docs/format.md
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

from qtool.serve.api.tools.call_reader import NO_MARKER, CallReader, Reading
from qtool.serve.api.tools.deltas import Delta, join_calls
from qtool.serve.api.tools.style import ToolStyle

MARKERS = (
    "<|start|>",
    "<|channel|>",
    "<|constrain|>",
    "<|message|>",
    "<|end|>",
    "<|call|>",
    "<|return|>",
)
_MARKER = re.compile("<")
_RECIPIENT = re.compile(r"to=(?:functions\.)?([^\s<]+)")


class HarmonyParser(CallReader):
    """Reads messages ``<|start|>assistant<|channel|>NAME to=RECIPIENT<|message|>TEXT<|end|>``.

    Those in the channel ``analysis`` are thoughts, and those to a recipient are calls.

    Text outside of messages is content.
    """

    def __init__(self) -> None:
        self._reasoning: list[str] = []
        self._thoughts = 0  # messages of thoughts
        super().__init__()

    def _take_delta(self) -> Delta:
        delta = Delta("".join(self._content), join_calls(self._deltas), "".join(self._reasoning))
        self._content.clear()
        self._deltas.clear()
        self._reasoning.clear()
        return delta

    def _delta_of(self, give: Callable[[str], object]) -> Callable[[str], Delta]:
        if give == self._give_thoughts:  # as they come: nothing is held
            return lambda text: Delta("", (), text)
        return super()._delta_of(give)

    def _read(self) -> Reading[None]:
        header: list[str] | None = None
        marker = ""
        while (yield from self._peek()) or marker:
            if marker in ("<|start|>", "<|channel|>", "<|constrain|>"):
                header = [*(header or ()), marker]
                marker = yield from self._take_piece(header.append)
            elif marker == "<|message|>" and header is not None:
                self._held.clear()
                marker = yield from self._take_message("".join(header))
                header = None
            elif marker:  # of an end, or a message without a header
                if marker != "<|message|>":
                    self._held.clear()
                self._give_content()
                marker = ""
                header = None
            else:
                marker = yield from self._take_piece(lambda text: self._give_content())
        self._give_content()

    def _take_message(self, header: str) -> Reading[str]:
        recipient = _RECIPIENT.search(header)
        if recipient is not None:
            self._begin_call(recipient[1])
            if marker := (yield from self._take_marker(*MARKERS)):
                self._give_arguments("{}")
                return marker
            if self._held:
                self._give_arguments("".join(self._held))
            return (yield from self._take_piece(self._give_arguments))
        if "<|channel|>analysis" in header:
            if self._thoughts:
                self._reasoning.append("\n")
            self._thoughts += 1
            return (yield from self._take_piece(self._give_thoughts))
        if self._has_content:
            self._space.append("\n")
        return (yield from self._take_piece(lambda text: self._give_content(), self._rest))

    def _give_thoughts(self, text: str) -> None:
        self._held.clear()
        self._reasoning.append(text)

    def _take_piece(
        self, give: Callable[[str], object], peek: Callable[[], Reading[str]] | None = None
    ) -> Reading[str]:
        """Take text up to a marker of the format, and the marker, which is returned."""
        peek = peek or partial(self._peek_run, _MARKER, give)
        while char := (yield from peek()):
            if char != "<":
                give(self._take(NO_MARKER))
                continue
            held = len(self._held)
            if marker := (yield from self._take_marker(*MARKERS)):
                return marker
            give("".join(self._held[held:]))
        return ""


STYLE = ToolStyle(
    make_parser=lambda tools: HarmonyParser(),
    shows=lambda template: "<|channel|>" in template and "<|message|>" in template,
    markers=MARKERS,
)
