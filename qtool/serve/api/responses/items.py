"""The items of a response, made of an answer piece by piece, and the events that tell of them."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Protocol

from msgspec import UNSET

from qtool.serve.api.responses.custom_input import CustomInput
from qtool.serve.api.responses.schemas import (
    ArgumentsDelta,
    ArgumentsDone,
    CustomInputDelta,
    CustomInputDone,
    ItemAdded,
    ItemDone,
    ItemStatus,
    OutputCall,
    OutputCustomCall,
    OutputItem,
    OutputMessage,
    OutputReasoning,
    OutputText,
    OutputTextDelta,
    OutputTextDone,
    PartAdded,
    PartDone,
    ReasoningText,
    ReasoningTextDelta,
    ReasoningTextDone,
    ResponseEvent,
)
from qtool.serve.api.responses.tools import CalledTool, ToolTable
from qtool.serve.api.schemas import TokenLogprob
from qtool.serve.api.sealed_thoughts import seal
from qtool.serve.api.tools.deltas import CallDelta, Delta


class _Open(Protocol):
    """An item that is not complete."""

    index: int
    """Its place in the response."""

    def item(self, status: ItemStatus) -> OutputItem:
        """Return the item as it is."""

    def begin(self) -> Iterator[ResponseEvent]:
        """Yield what follows the event that the item begins."""

    def end(self) -> Iterator[ResponseEvent]:
        """Yield what precedes the event that the item is complete."""


class OutputItems:
    """The items of one response, one after the other."""

    def __init__(self, tools: ToolTable, *, seals_thoughts: bool) -> None:
        self._tools = tools
        self._seals_thoughts = seals_thoughts
        self._open: _Open | None = None
        self._call = -1
        """The number of the call that is open."""
        self._logprobs: list[TokenLogprob] = []
        """Of tokens whose text is held back."""
        self.done: list[OutputItem] = []

    def add(
        self, delta: Delta, logprobs: list[TokenLogprob], reasoning_tokens: int
    ) -> Iterator[ResponseEvent]:
        """Yield the events for ``delta``; ``logprobs`` are those of its tokens, and wait for their
        text. The first ``reasoning_tokens`` of those that wait are of thoughts, and left out.
        """
        self._logprobs += logprobs
        del self._logprobs[:reasoning_tokens]
        if delta.reasoning:
            if not isinstance(self._open, _Thoughts):
                yield from self._start(_Thoughts(self._seals_thoughts))
            if isinstance(self._open, _Thoughts):
                yield self._open.add(delta.reasoning)
        if delta.content:
            if not isinstance(self._open, _Message):
                yield from self._start(_Message())
            if isinstance(self._open, _Message):
                yield self._open.add(delta.content, self._logprobs)
            self._logprobs = []
        for call in delta.calls:
            self._logprobs = []
            yield from self._add_call(call)

    def finish(self, *, complete: bool) -> Iterator[ResponseEvent]:
        """Yield the events that end the last item; without any, there is an empty message."""
        if self._open is None:
            yield from self._start(_Message())
        if isinstance(self._open, _Message):
            self._open.logprobs += self._logprobs  # of an end without text
        yield from self._close("completed" if complete else "incomplete")

    def _add_call(self, piece: CallDelta) -> Iterator[ResponseEvent]:
        if not isinstance(self._open, _Call) or self._call != piece.index:
            tool = self._tools.called(piece.name or "")
            yield from self._start(_Call(piece.id or "", tool))
            self._call = piece.index
        if isinstance(self._open, _Call):
            yield from self._open.add(piece.arguments)

    def _start(self, item: _Open) -> Iterator[ResponseEvent]:
        yield from self._close("completed")
        item.index = len(self.done)
        self._open = item
        yield ItemAdded(output_index=item.index, item=item.item("in_progress"))
        yield from item.begin()

    def _close(self, status: ItemStatus) -> Iterator[ResponseEvent]:
        if self._open is None:
            return
        yield from self._open.end()
        item = self._open.item(status)
        yield ItemDone(output_index=len(self.done), item=item)
        self.done.append(item)
        self._open = None


class _Message:
    def __init__(self) -> None:
        self._id = _new_id("msg")
        self.index = 0
        self._pieces: list[str] = []
        self.logprobs: list[TokenLogprob] = []

    def item(self, status: ItemStatus) -> OutputMessage:
        content = [] if status == "in_progress" else [self._text()]
        return OutputMessage(id=self._id, status=status, content=content)

    def begin(self) -> Iterator[ResponseEvent]:
        yield PartAdded(item_id=self._id, output_index=self.index, part=OutputText(""))

    def add(self, text: str, logprobs: list[TokenLogprob]) -> ResponseEvent:
        self._pieces.append(text)
        self.logprobs += logprobs
        return OutputTextDelta(
            item_id=self._id, output_index=self.index, delta=text, logprobs=logprobs
        )

    def end(self) -> Iterator[ResponseEvent]:
        text = self._text()
        yield OutputTextDone(
            item_id=self._id, output_index=self.index, text=text.text, logprobs=text.logprobs
        )
        yield PartDone(item_id=self._id, output_index=self.index, part=text)

    def _text(self) -> OutputText:
        return OutputText("".join(self._pieces), logprobs=self.logprobs)


class _Thoughts:
    def __init__(self, seals: bool) -> None:
        self._id = _new_id("rs")
        self.index = 0
        self._seals = seals
        self._pieces: list[str] = []

    def item(self, status: ItemStatus) -> OutputReasoning:
        if status == "in_progress":
            return OutputReasoning(id=self._id, status=status, content=[])
        text = "".join(self._pieces)
        return OutputReasoning(
            id=self._id,
            status=status,
            content=[ReasoningText(text)],
            encrypted_content=seal(text) if self._seals else None,
        )

    def begin(self) -> Iterator[ResponseEvent]:
        yield PartAdded(item_id=self._id, output_index=self.index, part=ReasoningText(""))

    def add(self, text: str) -> ResponseEvent:
        self._pieces.append(text)
        return ReasoningTextDelta(item_id=self._id, output_index=self.index, delta=text)

    def end(self) -> Iterator[ResponseEvent]:
        text = "".join(self._pieces)
        yield ReasoningTextDone(item_id=self._id, output_index=self.index, text=text)
        yield PartDone(item_id=self._id, output_index=self.index, part=ReasoningText(text))


class _Call:
    """A call of a function, or of a custom tool, whose input is unwrapped."""

    def __init__(self, call_id: str, tool: CalledTool) -> None:
        self._id = _new_id("ctc" if tool.is_custom else "fc")
        self.index = 0
        self._call_id = call_id
        self._tool = tool
        self._input = CustomInput() if tool.is_custom else None
        self._pieces: list[str] = []

    def item(self, status: ItemStatus) -> OutputCall | OutputCustomCall:
        text = "".join(self._pieces)
        namespace = self._tool.namespace or UNSET
        if self._tool.is_custom:
            return OutputCustomCall(
                id=self._id,
                call_id=self._call_id,
                name=self._tool.name,
                namespace=namespace,
                input=text,
                status=status,
            )
        return OutputCall(
            id=self._id,
            call_id=self._call_id,
            name=self._tool.name,
            namespace=namespace,
            arguments=text,
            status=status,
        )

    def begin(self) -> Iterator[ResponseEvent]:
        yield from ()

    def add(self, arguments: str) -> Iterator[ResponseEvent]:
        yield from self._add(arguments if self._input is None else self._input.push(arguments))

    def end(self) -> Iterator[ResponseEvent]:
        if self._input is None:
            yield ArgumentsDone(
                item_id=self._id,
                output_index=self.index,
                name=self._tool.name,
                arguments="".join(self._pieces),
            )
            return
        yield from self._add(self._input.finish())
        text = "".join(self._pieces)
        yield CustomInputDone(item_id=self._id, output_index=self.index, input=text)

    def _add(self, text: str) -> Iterator[ResponseEvent]:
        if not text:
            return
        self._pieces.append(text)
        event = ArgumentsDelta if self._input is None else CustomInputDelta
        yield event(item_id=self._id, output_index=self.index, delta=text)


def _new_id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(12)}"
