"""The bodies of `POST /v1/messages` and `/v1/messages/count_tokens`.

Source: Anthropic's API reference, version 2023-06-01, with the fields that Claude Code 2.1 sends.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from qtool.engine.sampling_params import MAX_STOP_STRINGS
from qtool.serve.api.body import Part
from qtool.serve.api.fields import (
    MAX_AGENT_TOOLS,
    MAX_MESSAGES,
    MAX_PARTS,
    Json,
    MaxTokens,
    ModelName,
    StopString,
    ToolName,
    Whole,
    bounded,
    without_empty,
)
from qtool.serve.api.protocol import CacheFields, check_content


class TextBlock(Part):
    """A piece of text."""

    type: Literal["text"]
    text: str


class ThinkingBlock(Part):
    """Thoughts of an earlier answer."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = None
    """The thoughts again, sealed, where ``thinking`` was omitted."""


class RedactedThinkingBlock(Part):
    """Thoughts that another server has encrypted; nothing here can read them."""

    type: Literal["redacted_thinking"]
    data: str


class ToolUseBlock(Part):
    """A call of the model."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: Json


class ResultBlock(Part):
    """A piece of what a tool returned; only the text of some types can be read."""

    type: str
    text: str | None = None
    tool_name: str | None = None
    """Of a tool_reference."""


class ToolResultBlock(Part):
    """What a tool returned."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: (
        str | Annotated[list[ResultBlock], Field(max_length=MAX_PARTS, fail_fast=True)] | None
    ) = None
    is_error: bool | None = None


BLOCKS = {
    "text": TextBlock,
    "thinking": ThinkingBlock,
    "redacted_thinking": RedactedThinkingBlock,
    "tool_use": ToolUseBlock,
    "tool_result": ToolResultBlock,
}


def _check_blocks(value: object) -> object:
    """Return ``value`` with documents of plain text as text; refuse blocks of other types by their
    name.
    """
    value = check_content(value)
    if not isinstance(value, list):
        return value
    value = [*map(_as_text_block, value)]
    for block in value:
        kind = block.get("type") if isinstance(block, dict) else None
        if isinstance(kind, str) and kind not in BLOCKS:
            message = "blocks of type `{kind}` are not offered: this server reads text, thoughts, "
            message += "tool_use and tool_result"
            raise PydanticCustomError("content_not_supported", message, {"kind": kind[:100]})
    return value


def _as_text_block(block: object) -> object:
    """Return a document of plain text as a block of text, and other blocks as they are."""
    if not isinstance(block, dict) or block.get("type") != "document":
        return block
    source, citations = block.get("source"), block.get("citations")
    if not isinstance(source, dict) or source.get("type") != "text":
        return block
    if isinstance(citations, dict) and citations.get("enabled"):
        return block  # refused later: answers have no citations
    parts = [block.get("title"), block.get("context"), source.get("data")]
    return {"type": "text", "text": "\n".join(str(part) for part in parts if part)}


def _type_of(block: object) -> str | None:
    kind = block.get("type") if isinstance(block, dict) else getattr(block, "type", None)
    return kind if isinstance(kind, str) else None


Block = Annotated[
    Annotated[TextBlock, Tag("text")]
    | Annotated[ThinkingBlock, Tag("thinking")]
    | Annotated[RedactedThinkingBlock, Tag("redacted_thinking")]
    | Annotated[ToolUseBlock, Tag("tool_use")]
    | Annotated[ToolResultBlock, Tag("tool_result")],
    Discriminator(_type_of),
]


class InputMessage(Part):
    """One turn; Claude Code also sends instructions of the system between turns."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[
        str | Annotated[list[Block], Field(max_length=MAX_PARTS, fail_fast=True)],
        BeforeValidator(_check_blocks),
    ]


class ToolDefinition(Part):
    """A tool: the client's own, which has an ``input_schema``, or one that Anthropic runs."""

    type: str | None = None
    name: ToolName | None = None
    description: str | None = None
    input_schema: Json | None = None
    strict: bool | None = None

    @property
    def is_own(self) -> bool:
        """Whether the client defines and runs it."""
        return self.type in (None, "custom")

    @model_validator(mode="after")
    def _has_schema(self) -> ToolDefinition:
        if self.is_own and (self.name is None or self.input_schema is None):
            raise ValueError("a tool has a name and an input_schema")
        return self


class ToolChoice(Part):
    """Whether the model may, must or must not call a tool."""

    type: Literal["auto", "any", "tool", "none"]
    name: ToolName | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Part):
    """Whether the model thinks first."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Whole | None = None
    """Accepted without effect: the number of tokens of thoughts is the model's affair."""

    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(Part):
    """The form that the answer must have."""

    type: Literal["json_schema"]
    schema_: Json = Field(alias="schema")


class OutputConfig(Part):
    """How much the model should think, and the form of its answer."""

    effort: str | None = None
    format: OutputFormat | None = None


class MessagesRequest(CacheFields):
    """``POST /v1/messages``, and, without what is generated, ``/v1/messages/count_tokens``."""

    without_effect: ClassVar[frozenset[str]] = frozenset(
        ("betas", "cache_control", "context_management", "diagnostics", "inference_geo", "speed")
    )
    not_offered: ClassVar[dict[str, str]] = {
        "container": "this server runs no code",
        "mcp_servers": "this server calls no other; give the tools themselves",
        "max_completion_tokens": "its name here is `max_tokens`",
        "max_output_tokens": "its name here is `max_tokens`",
        "n": "there is one answer",
        "reasoning_effort": "its name here is `output_config.effort`",
        "response_format": "its name here is `output_config.format`",
        "stop": "its name here is `stop_sequences`",
    }

    model: ModelName | None = None
    messages: Annotated[
        list[InputMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    ]
    system: str | Annotated[list[TextBlock], Field(max_length=MAX_PARTS, fail_fast=True)] | None = (
        None
    )
    max_tokens: MaxTokens | None = None
    """Anthropic asks for it; without it an answer ends at the end of the context."""

    tools: (
        Annotated[list[ToolDefinition], Field(max_length=MAX_AGENT_TOOLS, fail_fast=True)] | None
    ) = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    """The earlier name of ``output_config.format``."""

    stop_sequences: (
        Annotated[
            list[StopString],
            Field(max_length=MAX_STOP_STRINGS, fail_fast=True),
            BeforeValidator(without_empty),
        ]
        | None
    ) = None
    chat_template_kwargs: Json | None = None
    """Variables of the chat template (vLLM's), in place of those that ``thinking`` sets."""

    stream: bool | None = None
    temperature: Annotated[float, bounded("temperature")] | None = None
    top_p: Annotated[float, bounded("top_p")] | None = None
    top_k: Annotated[Whole, bounded("top_k")] | None = None
