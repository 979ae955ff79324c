"""Separates the text of one answer into reasoning, content and calls."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qtool.serve.api.protocol import ChatRequest
from qtool.serve.api.reasoning.styles import STYLES, state_after
from qtool.serve.api.reasoning.thoughts import Markers, State, ThoughtReader
from qtool.serve.api.tools.choice import Choice
from qtool.serve.api.tools.deltas import Delta, ToolParser, WholeAnswer, fold, join_calls
from qtool.serve.api.tools.parsers import parser_for
from qtool.serve.service import Service


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerForm:
    """What the text of an answer may consist of."""

    choice: Choice
    """What the request lets the model call."""

    tool_style: str | None = None
    """How the model writes calls in a free answer; None if it does not."""

    markers: Markers | None = None
    """What stands around thoughts; None if all of them are content."""

    state: State = "undecided"
    """Where the answer begins."""

    shows_reasoning: bool = True
    """Whether thoughts are returned, and not dropped."""


def form_of(service: Service, body: ChatRequest, choice: Choice, prompt: str) -> AnswerForm:
    """Return the form of the answers to ``prompt``, the rendered messages of ``body``."""
    style = service.reasoning_style
    if style is None or body.separate_reasoning is False:
        return AnswerForm(choice=choice, tool_style=service.tool_style)
    return AnswerForm(
        choice=choice,
        tool_style=service.tool_style,
        markers=STYLES[style],
        state=state_after(prompt, STYLES[style]),
        shows_reasoning=body.include_reasoning is not False,
    )


def read_whole(form: AnswerForm, text: str) -> WholeAnswer:
    """Return what ``text`` is, all of an answer."""
    reader = AnswerReader(form)
    whole = fold([reader.push(text), reader.finish()])
    if form.choice.mode == "required":
        return replace(whole, content=None)
    return whole


class AnswerReader:
    """Reads one answer in pieces of any size; its work is linear in the text."""

    def __init__(self, form: AnswerForm) -> None:
        self._thoughts: ThoughtReader | None = None
        self._parser: ToolParser | None = parser_for(form.choice, form.tool_style)
        if form.markers is not None:
            may_call = form.choice.mode != "none"
            self._thoughts = ThoughtReader(form.markers, form.state, may_call=may_call)
        self._shows_reasoning = form.shows_reasoning
        # without a whole call the text of a forced call is cut off, and no answer
        self._drops_content = form.choice.mode == "required"

    @property
    def called(self) -> bool:
        """Whether a call was found: `finish_reason` is then ``tool_calls``."""
        return self._parser is not None and self._parser.called

    def push(self, text: str) -> Delta:
        """Take the next piece of text; what may belong to a marker or a call is held back."""
        reasoning = ""
        if self._thoughts is not None:
            reasoning, text = self._thoughts.push(text)
        return self._delta(reasoning, self._pushed(text))

    def finish(self) -> Delta:
        """End the text, and return what was held back."""
        reasoning, text = "", ""
        if self._thoughts is not None:
            reasoning, text = self._thoughts.finish()
        delta = self._pushed(text)
        if self._parser is not None:
            delta = _joined(delta, self._parser.finish())
        return self._delta(reasoning, delta)

    def _pushed(self, text: str) -> Delta:
        if self._parser is None or not text:
            return Delta(content=text)
        return self._parser.push(text)

    def _delta(self, reasoning: str, answer: Delta) -> Delta:
        return Delta(
            content="" if self._drops_content else answer.content,
            calls=answer.calls,
            reasoning=reasoning if self._shows_reasoning else "",
        )


def _joined(first: Delta, second: Delta) -> Delta:
    calls = join_calls((*first.calls, *second.calls))
    return Delta(content=first.content + second.content, calls=calls)
