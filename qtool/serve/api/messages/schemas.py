"""What `POST /v1/messages` replies: the message, and the events of a stream."""

from __future__ import annotations

from typing import Any, Literal, get_args

from msgspec import UNSET, Struct, UnsetType
from pydantic import BaseModel

StopReason = Literal[
    "end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"
]


class MessageText(Struct, tag_field="type", tag="text"):
    """A piece of the answer."""

    text: str


class MessageThinking(Struct, tag_field="type", tag="thinking"):
    """Thoughts."""

    thinking: str
    signature: str
    """The thoughts again, sealed, where the request leaves them out of ``thinking``."""


class MessageToolUse(Struct, tag_field="type", tag="tool_use"):
    """A call of a tool."""

    id: str
    name: str
    input: dict[str, Any]


Content = MessageText | MessageThinking | MessageToolUse


class MessageOutputTokens(Struct):
    """What the tokens of an answer were."""

    thinking_tokens: int


class MessageUsage(Struct):
    """Tokens of a request."""

    input_tokens: int
    """Of the prompt, without those found in the prefix cache."""
    output_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0
    """Found in the prefix cache."""
    output_tokens_details: MessageOutputTokens | UnsetType = UNSET
    """Where thoughts are told apart."""


class AnthropicMessage(Struct, kw_only=True):
    """The reply of ``POST /v1/messages``."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[Content]
    stop_reason: StopReason | None
    """None in the first event of a stream."""
    stop_sequence: str | None
    usage: MessageUsage


class MessageTextDelta(Struct, tag_field="type", tag="text_delta"):
    """More text."""

    text: str


class MessageThinkingDelta(Struct, tag_field="type", tag="thinking_delta"):
    """More thoughts."""

    thinking: str


class MessageSignatureDelta(Struct, tag_field="type", tag="signature_delta"):
    """The signature of the thoughts, which are complete."""

    signature: str


class MessageInputDelta(Struct, tag_field="type", tag="input_json_delta"):
    """More of the JSON of a tool's input."""

    partial_json: str


class MessageStart(Struct, tag_field="type", tag="message_start"):
    """The first event of a stream."""

    message: AnthropicMessage


class MessageBlockStart(Struct, tag_field="type", tag="content_block_start"):
    """A block begins."""

    index: int
    content_block: Content


class MessageBlockDelta(Struct, tag_field="type", tag="content_block_delta"):
    """A block gains something."""

    index: int
    delta: MessageTextDelta | MessageThinkingDelta | MessageSignatureDelta | MessageInputDelta


class MessageBlockStop(Struct, tag_field="type", tag="content_block_stop"):
    """A block is complete."""

    index: int


class StopInfo(Struct):
    """Why the answer ended."""

    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(Struct, tag_field="type", tag="message_delta"):
    """What is known at the end."""

    delta: StopInfo
    usage: MessageUsage


class MessageStop(Struct, tag_field="type", tag="message_stop"):
    """The last event of a stream."""


class Ping(Struct, tag_field="type", tag="ping"):
    """Nothing; the stream goes on."""


MessageEvent = (
    MessageStart
    | MessageBlockStart
    | MessageBlockDelta
    | MessageBlockStop
    | MessageDelta
    | MessageStop
    | Ping
)


GENERATED: tuple[type[Struct], ...] = (AnthropicMessage, *get_args(MessageEvent))


class TokenCount(BaseModel):
    """The reply of ``POST /v1/messages/count_tokens``."""

    input_tokens: int


class AnthropicErrorDetail(BaseModel):
    """What went wrong."""

    type: str
    message: str


class AnthropicError(BaseModel):
    """Every response without status 2xx of these routes, in Anthropic's shape."""

    type: Literal["error"] = "error"
    error: AnthropicErrorDetail
