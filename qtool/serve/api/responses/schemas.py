"""What `POST /v1/responses` replies: the response, and the events of a stream."""

from __future__ import annotations

from typing import Any, Literal, get_args

from msgspec import UNSET, Struct, UnsetType
from pydantic import BaseModel

from qtool.serve.api.schemas import TokenLogprob

ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputText(Struct, tag_field="type", tag="output_text"):
    """The text of a message."""

    text: str
    annotations: list[Any] = []
    logprobs: list[TokenLogprob] = []


class ReasoningText(Struct, tag_field="type", tag="reasoning_text"):
    """The text of thoughts."""

    text: str


class OutputMessage(Struct, kw_only=True, tag_field="type", tag="message"):
    """What the model says."""

    id: str
    status: ItemStatus
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class OutputReasoning(Struct, kw_only=True, tag_field="type", tag="reasoning"):
    """What the model thinks."""

    id: str
    status: ItemStatus
    summary: list[Any] = []
    content: list[ReasoningText]
    encrypted_content: str | None = None
    """The thoughts again, sealed, if the request includes them."""


class OutputCall(Struct, kw_only=True, tag_field="type", tag="function_call"):
    """A call of a function."""

    id: str
    call_id: str
    name: str
    namespace: str | UnsetType = UNSET
    arguments: str
    """JSON, as text."""
    status: ItemStatus


class OutputCustomCall(Struct, kw_only=True, tag_field="type", tag="custom_tool_call"):
    """A call of a custom tool."""

    id: str
    call_id: str
    name: str
    namespace: str | UnsetType = UNSET
    input: str
    status: ItemStatus


OutputItem = OutputMessage | OutputReasoning | OutputCall | OutputCustomCall


class InputTokens(Struct):
    """What is known of the prompt's tokens."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokens(Struct):
    """What the tokens of the answer were."""

    reasoning_tokens: int


class ResponseUsage(Struct):
    """Tokens of a request."""

    input_tokens: int
    input_tokens_details: InputTokens
    output_tokens: int
    output_tokens_details: OutputTokens
    total_tokens: int


class FailedResponse(Struct):
    """Why there is no answer."""

    code: str
    message: str


class Incomplete(Struct):
    """Why an answer is not complete; None if it was aborted."""

    reason: Literal["max_output_tokens"] | None


class ResponseObject(Struct, kw_only=True):
    """The reply of ``POST /v1/responses``; it repeats fields of the request."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: Literal[False] = False
    error: FailedResponse | None = None
    incomplete_details: Incomplete | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, Any]
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: None = None
    reasoning: dict[str, Any]
    store: Literal[False] = False
    """Nothing is stored."""
    temperature: float | None
    text: dict[str, Any]
    tool_choice: Any
    tools: list[Any]
    top_logprobs: int | None
    top_p: float | None
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None


class Event(Struct, kw_only=True, tag_field="type"):
    """An event of a stream."""

    sequence_number: int = 0


class ResponseCreated(Event, kw_only=True, tag="response.created"):
    """The first event of a stream."""

    response: ResponseObject


class ResponseInProgress(Event, kw_only=True, tag="response.in_progress"):
    """The answer begins."""

    response: ResponseObject


class ResponseCompleted(Event, kw_only=True, tag="response.completed"):
    """The last event of a stream."""

    response: ResponseObject


class ResponseIncomplete(Event, kw_only=True, tag="response.incomplete"):
    """The last event of a stream whose answer is cut off."""

    response: ResponseObject


class ResponseFailed(Event, kw_only=True, tag="response.failed"):
    """The last event of a stream that an error ended."""

    response: ResponseObject


class ItemAdded(Event, kw_only=True, tag="response.output_item.added"):
    """An item begins."""

    output_index: int
    item: OutputItem


class ItemDone(Event, kw_only=True, tag="response.output_item.done"):
    """An item is complete."""

    output_index: int
    item: OutputItem


class PartEvent(Event, kw_only=True):
    """An event of a part of an item."""

    item_id: str
    output_index: int
    content_index: int = 0


class PartAdded(PartEvent, kw_only=True, tag="response.content_part.added"):
    """A part of an item begins."""

    part: OutputText | ReasoningText


class PartDone(PartEvent, kw_only=True, tag="response.content_part.done"):
    """A part of an item is complete."""

    part: OutputText | ReasoningText


class OutputTextDelta(PartEvent, kw_only=True, tag="response.output_text.delta"):
    """More text."""

    delta: str
    logprobs: list[TokenLogprob] = []


class OutputTextDone(PartEvent, kw_only=True, tag="response.output_text.done"):
    """The text is complete."""

    text: str
    logprobs: list[TokenLogprob] = []


class ReasoningTextDelta(PartEvent, kw_only=True, tag="response.reasoning_text.delta"):
    """More thoughts."""

    delta: str


class ReasoningTextDone(PartEvent, kw_only=True, tag="response.reasoning_text.done"):
    """The thoughts are complete."""

    text: str


class CallEvent(Event, kw_only=True):
    """An event of a call."""

    item_id: str
    output_index: int


class ArgumentsDelta(CallEvent, kw_only=True, tag="response.function_call_arguments.delta"):
    """More arguments."""

    delta: str


class ArgumentsDone(CallEvent, kw_only=True, tag="response.function_call_arguments.done"):
    """The arguments are complete."""

    name: str
    arguments: str


class CustomInputDelta(CallEvent, kw_only=True, tag="response.custom_tool_call_input.delta"):
    """More of the input of a custom tool."""

    delta: str


class CustomInputDone(CallEvent, kw_only=True, tag="response.custom_tool_call_input.done"):
    """The input of a custom tool is complete."""

    input: str


ResponseEvent = (
    ResponseCreated
    | ResponseInProgress
    | ResponseCompleted
    | ResponseIncomplete
    | ResponseFailed
    | ItemAdded
    | ItemDone
    | PartAdded
    | PartDone
    | OutputTextDelta
    | OutputTextDone
    | ReasoningTextDelta
    | ReasoningTextDone
    | ArgumentsDelta
    | ArgumentsDone
    | CustomInputDelta
    | CustomInputDone
)


class InputTokenCount(BaseModel):
    """The reply of ``POST /v1/responses/input_tokens``."""

    object: Literal["response.input_tokens"] = "response.input_tokens"
    input_tokens: int


GENERATED: tuple[type[Struct], ...] = (ResponseObject, *get_args(ResponseEvent))
