"""Tool calls as xLAM 2 writes them: a JSON array that is the whole answer.

Source: vLLM's templates for it, `examples/tool_chat_template_xlam_*.jinja`.
"""

from __future__ import annotations

from collections.abc import Iterable

from qtool.serve.api.tools.call_reader import REST, CallReader, Reading
from qtool.serve.api.tools.style import ToolStyle, json_array


class XlamParser(CallReader):
    """Reads ``[{"name": ..., "arguments": ...}, ...]`` at the start of an answer, where the
    functions are among the tools.
    """

    def __init__(self, tool_names: Iterable[str]) -> None:
        self._names = frozenset(tool_names)
        super().__init__()

    def _read(self) -> Reading[None]:
        yield from self._take_space()
        if (yield from self._peek()) == "[":
            yield from self._take_calls(self._names)
        self._give_content()
        while (yield from self._rest()):
            self._take(REST)
            self._give_content()


STYLE = ToolStyle(
    make_parser=lambda tools: XlamParser(tool.function.name for tool in tools),
    shows=lambda template: "make calls in a single JSON array" in template,
    form=json_array(""),
)
