"""Tool calls as Llama 3 and 4 write them in JSON."""

from __future__ import annotations

import re
from collections.abc import Iterable

from qtool.serve.api.tools.call_reader import NO_MARKER, CallReader, Reading
from qtool.serve.api.tools.style import NAME, CallForm, ToolStyle

_FORMAT = re.compile(r'\{\\?"name\\?": function name, \\?"parameters\\?": ')


class LlamaParser(CallReader):
    """Reads calls that are the whole answer, separated by ``;`` or white space, and calls that
    follow ``<|python_tag|>``, with or without content before them.
    """

    def __init__(self, tool_names: Iterable[str]) -> None:
        self._names = frozenset(tool_names)
        super().__init__()

    def _read(self) -> Reading[None]:
        # a call may begin here without a marker: at the start, or after another call
        may_call = True
        while (yield from self._peek() if may_call else self._rest()):
            if may_call:
                yield from self._take_separator()
            may_call = yield from self._take_call_here(bare=may_call)
            if may_call:
                self._held.clear()
            else:
                self._give_content()
                self._take(NO_MARKER)
                self._give_content()

    def _take_separator(self) -> Reading[None]:
        if self._calls:
            yield from self._take_char(";")
        yield from self._take_space()
        if self._calls and not (yield from self._peek()):
            self._held.clear()

    def _take_call_here(self, *, bare: bool) -> Reading[bool]:
        """Take the call that begins here, after a marker or, if it may be ``bare``, without one;
        return False if there is none.
        """
        char = yield from self._peek()
        if char == "<" and (yield from self._take_marker("<|python_tag|>")):
            yield from self._take_space()
            return (yield from self._take_call())
        if bare and char == "{":
            return (yield from self._take_call(self._names))
        return False


STYLE = ToolStyle(
    make_parser=lambda tools: LlamaParser(tool.function.name for tool in tools),
    shows=lambda template: _FORMAT.search(template) is not None,
    markers=("<|python_tag|>",),
    form=CallForm(begin=f'{{"name": "{NAME}", "parameters": ', end="}", between="; "),
)
