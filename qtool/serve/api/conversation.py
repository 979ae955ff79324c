"""A conversation in the form that chat templates take, made of what agents send: turns in pieces,
and instructions at any place.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from qtool.serve.api.fields import Json
from qtool.serve.api.other_fields import log_once
from qtool.serve.api.protocol import Function, FunctionCall, Message, Tool, ToolCall

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(kw_only=True)
class _Turn:
    role: Role
    texts: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    call_id: str | None = None
    name: str | None = None

    def message(self) -> Message:
        return Message.model_construct(
            role=self.role,
            content="\n\n".join(self.texts),
            reasoning_content="\n\n".join(self.thoughts) or None,
            tool_calls=self.calls or None,
            tool_call_id=self.call_id,
            name=self.name,
        )


class Conversation:
    """Collects messages.

    Templates take one system message, at the beginning, and turns that alternate. So the first
    instructions become the system message, and neighbouring turns of one role become one. Later
    instructions go to the end of the turn before them, or to the front of the one that follows an
    answer: a longer conversation then begins as it did before, and is found in the prefix cache.
    """

    def __init__(self, template: str | None = None) -> None:
        self._alternates = "must alternate" in (template or "")
        """Whether the template refuses a turn of the user after the result of a tool."""
        self._turns: list[_Turn] = []
        self._names: dict[str, str] = {}
        """Of the functions that were called, by the id of the call."""
        self._held: list[str] = []
        """Instructions after an answer."""

    def instruct(self, text: str) -> None:
        """Add instructions of the system or the developer."""
        if not text:
            return
        if not self._turns:
            self._turns.append(_Turn(role="system"))
        last = self._turns[-1]
        (self._held if last.role == "assistant" else last.texts).append(text)

    def ask(self, text: str) -> None:
        """Add what the user says."""
        after_result = bool(self._turns) and self._turns[-1].role == "tool"
        turn = self._turn("tool" if self._alternates and after_result else "user")
        turn.texts += [*self._take_held(), text] if text else self._take_held()

    def answer(self, text: str = "", *, thoughts: str = "") -> None:
        """Add a part of an answer of the model; its calls are added apart."""
        self._flush_held()
        turn = self._turn("assistant")
        turn.texts += [text] if text else []
        turn.thoughts += [thoughts] if thoughts else []

    def call(self, call_id: str, name: str, arguments: str) -> None:
        """Add a call of the model. ``arguments`` are JSON."""
        self._flush_held()
        self._names[call_id] = name
        function = FunctionCall.model_construct(name=name, arguments=arguments)
        call = ToolCall.model_construct(id=call_id, type="function", function=function)
        self._turn("assistant").calls.append(call)

    def result(self, call_id: str, text: str) -> None:
        """Add what a call returned."""
        texts = [text] if text else []
        name = self._names.get(call_id)
        turn = _Turn(role="tool", call_id=call_id, name=name, texts=texts + self._take_held())
        self._turns.append(turn)

    def messages(self) -> list[Message]:
        """Return the whole conversation."""
        self._flush_held()
        return [turn.message() for turn in self._turns]

    def _turn(self, role: Role) -> _Turn:
        """Return the last turn, if it is of ``role``, or a new one."""
        if not self._turns or self._turns[-1].role != role:
            self._turns.append(_Turn(role=role))
        return self._turns[-1]

    def _take_held(self) -> list[str]:
        held, self._held = self._held, []
        return held

    def _flush_held(self) -> None:
        if self._held:
            self.ask("")


def function_tool(
    name: str, description: str | None, parameters: Json | None, strict: bool | None = None
) -> Tool:
    """Return a tool with everything that templates of published models ask of one: agents leave out
    a description, and the properties of a function without arguments.
    """
    given = parameters or {"type": "object"}
    function = Function.model_construct(
        name=name,
        description=description or "",
        parameters=given if "properties" in given else {**given, "properties": {}},
        strict=strict,
    )
    return Tool.model_construct(type="function", function=function)


def note_unread(kind: str) -> str:
    """Return what the model reads in place of a part of a tool's result that is no text, such as an
    image that it asked for: the conversation can go on.
    """
    log_once("results of tools have parts of type `%s`, which the model cannot read", kind)
    return f"({kind[:40]}: this model reads only text)"
