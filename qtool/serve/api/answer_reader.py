"""Separates the text of one answer into reasoning, content and calls."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qtool.engine.sampling_params import SamplingParams
from qtool.serve.api.prompt import join_content
from qtool.serve.api.protocol import ChatRequest
from qtool.serve.api.reasoning.styles import STYLES, state_after
from qtool.serve.api.reasoning.thoughts import Markers, State, ThoughtReader
from qtool.serve.api.tools.choice import Choice
from qtool.serve.api.tools.deltas import Delta, ToolParser, WholeAnswer, fold, join_calls
from qtool.serve.api.tools.harmony import HarmonyParser
from qtool.serve.api.tools.parsers import parser_for, tool_markers
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

    separates: bool = True
    """Whether thoughts are told from content."""

    shows_reasoning: bool = True
    """Whether thoughts are returned, and not dropped."""

    streams_reasoning: bool = True
    """Whether thoughts are returned as they come, and not all at once."""

    parallel: bool = True
    """Whether there may be more than one call; others are dropped."""

    def constrain(self, params: SamplingParams) -> SamplingParams:
        """Return ``params`` with the markers that the engine must know: stop strings and grammars
        hold what follows the thoughts, and markers stay in the text though they may be special
        tokens.
        """
        kept = tool_markers(self.choice, self.tool_style)
        if self.markers is None or self.state == "closed":
            return replace(params, kept_special_tokens=kept) if kept else params
        inside = self.state == "open" or self.markers.implicit
        return replace(
            params,
            reasoning_start=None if inside else self.markers.start,
            reasoning_end=self.markers.engine_ends,
            reasoning_calls=() if self.choice.mode == "none" else self.markers.calls,
            kept_special_tokens=(*kept, self.markers.start, *self.markers.special),
        )


def form_of(service: Service, body: ChatRequest, choice: Choice, prompt: str) -> AnswerForm:
    """Return the form of the answers to ``prompt``, the rendered messages of ``body``."""
    style = service.reasoning_style
    parallel = body.parallel_tool_calls is not False
    if style is None:
        return AnswerForm(choice=choice, tool_style=service.tool_style, parallel=parallel)
    state = state_after(prompt, STYLES[style], continued=_continued(body))
    if state == "undecided" and _wants_no_thoughts(body):
        state = "closed"
    return AnswerForm(
        choice=choice,
        tool_style=service.tool_style,
        markers=STYLES[style],
        state=state,
        separates=body.separate_reasoning is not False,
        shows_reasoning=body.include_reasoning is not False,
        streams_reasoning=body.stream_reasoning is not False,
        parallel=parallel,
    )


def _continued(body: ChatRequest) -> str | None:
    """Return the beginning of the answer, where a request gives it."""
    if not body.continue_final_message:
        return None
    return join_content(body.messages[-1].content)


def _wants_no_thoughts(body: ChatRequest) -> bool:
    kwargs = body.chat_template_kwargs or {}
    if body.reasoning_effort == "none":
        return True
    return kwargs.get("enable_thinking") is False or kwargs.get("thinking") is False


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
        self._thoughts: ThoughtReader | HarmonyParser | None = None
        """Finds the thoughts; in harmony's format, also calls."""
        self._parser: ToolParser | None = parser_for(form.choice, form.tool_style)
        in_messages = form.markers is not None and form.markers.in_messages
        if in_messages or isinstance(self._parser, HarmonyParser):
            self._thoughts = HarmonyParser()
            if isinstance(self._parser, HarmonyParser):
                self._parser = None
        elif form.markers is not None and form.separates:
            may_call = form.choice.mode != "none"
            self._thoughts = ThoughtReader(form.markers, form.state, may_call=may_call)
        self._shows_reasoning = form.shows_reasoning
        # without a whole call the text of a forced call is cut off, and no answer
        self._drops_content = form.choice.mode == "required"
        self._parallel = form.parallel
        self._held_reasoning: list[str] | None = None if form.streams_reasoning else []
        self._keeps_all = (
            self._shows_reasoning and form.streams_reasoning and not self._drops_content
        )
        self.called = False
        """Whether a call was found: `finish_reason` is then ``tool_calls``."""

    def push(self, text: str) -> Delta:
        """Take the next piece of text; what may belong to a marker or a call is held back."""
        delta = Delta(text) if self._thoughts is None else self._thoughts.push(text)
        if self._parser is not None and delta.content:
            delta = _join(delta, self._parser.push(delta.content))
        if delta.calls:
            self.called = True
        if self._keeps_all and (self._parallel or not delta.calls):
            return delta
        return self._select(delta)

    def finish(self) -> Delta:
        """End the text, and return what was held back."""
        delta = Delta() if self._thoughts is None else self._thoughts.finish()
        if self._parser is not None:
            pushed = self._parser.push(delta.content)
            rest = self._parser.finish()
            calls = join_calls((*pushed.calls, *rest.calls))
            delta = _join(delta, Delta(pushed.content + rest.content, calls))
        self.called = self.called or bool(delta.calls)
        return self._select(delta, ends=True)

    def _select(self, delta: Delta, *, ends: bool = False) -> Delta:
        """Return the parts of ``delta`` that the request asks for."""
        calls = delta.calls
        if not self._parallel:
            calls = tuple(call for call in calls if call.index == 0)
        content = "" if self._drops_content else delta.content
        reasoning = delta.reasoning if self._shows_reasoning else ""
        if self._held_reasoning is not None:
            self._held_reasoning.append(reasoning)
            reasoning = ""
            if ends or delta.content or calls:
                reasoning = "".join(self._held_reasoning)
                self._held_reasoning.clear()
        return Delta(content, calls, reasoning)


def _join(first: Delta, answer: Delta) -> Delta:
    """Return ``answer``, read from the content of ``first``, with the other parts of ``first``."""
    if not (first.reasoning or first.calls):
        return answer
    return Delta(answer.content, (*first.calls, *answer.calls), first.reasoning)
