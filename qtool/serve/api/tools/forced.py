"""Tool calls of answers that a JSON schema forces to be nothing else."""

from __future__ import annotations

from qtool.serve.api.tools.call_reader import REST, CallReader, Reading
from qtool.serve.api.tools.deltas import CallDelta, Delta, new_call_id


class NamedParser:
    """Reads an answer that is, by its schema, the arguments of one function."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.called = False

    def push(self, text: str) -> Delta:
        """Take the next piece of the arguments; the first piece also returns the name."""
        if not text:
            return Delta("", ())
        if self.called:
            return Delta("", (CallDelta(0, None, None, text),))
        self.called = True
        return Delta("", (CallDelta(0, new_call_id(), self._name, text),))

    def finish(self) -> Delta:
        """Return nothing, as nothing is held back."""
        return Delta("", ())


class RequiredParser(CallReader):
    """Reads the array of calls that `schema_for` makes of an answer that must call a tool."""

    def _read(self) -> Reading[None]:
        yield from self._take_calls()
        while (yield from self._peek()):
            self._take(REST)
        self._give_content()
