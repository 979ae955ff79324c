"""Tool calls as a JSON array after a marker: the styles of Granite 3, Phi-4 and others differ in
the markers alone.
"""

from __future__ import annotations

from qtool.serve.api.tools.call_reader import Reading
from qtool.serve.api.tools.marked_reader import MarkedReader


class ArrayParser(MarkedReader):
    """Reads ``[{"name": ..., "arguments": ...}, ...]`` after one of ``starts``, and perhaps an end
    marker; a single call needs no brackets.

    Args:
        starts: the markers in front of calls.
        ends: those after them.
    """

    def __init__(self, starts: tuple[str, ...], ends: tuple[str, ...] = ()) -> None:
        self.starts = starts
        self._ends = ends
        super().__init__()

    def _take_after(self, marker: str) -> Reading[bool]:
        yield from self._take_space()
        if (yield from self._peek()) == "[":
            called = yield from self._take_calls()
        else:
            called = yield from self._take_call()
            if called:
                self._held.clear()
        if called:
            self._passed = self._ends
        return called
