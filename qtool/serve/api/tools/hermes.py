"""Tool calls as Hermes and Qwen write them."""

from __future__ import annotations

from qtool.serve.api.tools.call_reader import NO_MARKER, CallReader, Reading


class HermesParser(CallReader):
    """Reads calls between ``<tool_call>`` and ``</tool_call>``, with content around them.

    A call counts without its end marker, too.
    """

    def _read(self) -> Reading[None]:
        called = False  # a call was returned and its end marker is still to come
        while char := (yield from self._peek()):
            if char != "<":
                self._take(NO_MARKER)
                self._give_content()
                continue
            marker = yield from self._take_marker("<tool_call>", "</tool_call>")
            if marker == "</tool_call>" and called:
                called = False
                self._held.clear()
                continue
            if marker == "<tool_call>":
                yield from self._take_space()
                called = yield from self._take_call()
            if marker == "<tool_call>" and called:
                self._held.clear()
            else:
                self._give_content()
