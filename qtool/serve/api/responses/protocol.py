"""The body of `POST /v1/responses`.

Sources: OpenAI's API reference; what Codex 0.171 sends.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from qtool.engine.sampling_params import MAX_TOP_LOGPROBS
from qtool.serve.api.body import Part
from qtool.serve.api.fields import (
    MAX_AGENT_TOOLS,
    MAX_MESSAGES,
    MAX_PARTS,
    Json,
    MaxTokens,
    ModelName,
    RequestId,
    ToolName,
    Whole,
    Word,
)
from qtool.serve.api.protocol import CacheFields, SamplingFields, StreamOptions, check_content

NO_STORE = "nothing is stored: send the whole conversation in `input`"
REFUSED_ITEMS = {
    "item_reference": "nothing is stored: send the item itself, as clients do with `store: false`",
    "compaction": "only the server that compacted a conversation can read it",
    "compaction_summary": "only the server that compacted a conversation can read it",
}


class ItemText(Part):
    """A piece of text in an item."""

    type: Literal["input_text", "output_text", "text", "refusal", "summary_text", "reasoning_text"]
    text: str | None = None
    refusal: str | None = None

    @property
    def shown(self) -> str:
        """The text."""
        return (self.refusal if self.type == "refusal" else self.text) or ""

    @model_validator(mode="after")
    def _has_text(self) -> ItemText:
        if (self.refusal if self.type == "refusal" else self.text) is None:
            raise ValueError(f"a part of type {self.type} has no text")
        return self


Texts = Annotated[list[ItemText], Field(max_length=MAX_PARTS, fail_fast=True)]


class MessageItem(Part):
    """One turn, or a part of it."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Annotated[str | Texts, BeforeValidator(check_content)]


class ReasoningItem(Part):
    """Thoughts of an earlier answer."""

    type: Literal["reasoning"]
    summary: Texts | None = None
    content: Texts | None = None
    encrypted_content: str | None = None
    """The thoughts, sealed."""


class FunctionCallItem(Part):
    """A call of the model."""

    type: Literal["function_call"]
    call_id: str
    name: str
    namespace: str | None = None
    arguments: str


class CustomCallItem(Part):
    """A call of a custom tool."""

    type: Literal["custom_tool_call"]
    call_id: str
    name: str
    namespace: str | None = None
    input: str


class OutputPart(Part):
    """A piece of what a call returned; only text can be read."""

    type: str
    text: str | None = None


class CallOutputItem(Part):
    """What a call returned."""

    type: Literal["function_call_output", "custom_tool_call_output"]
    call_id: str
    output: str | Annotated[list[OutputPart], Field(max_length=MAX_PARTS, fail_fast=True)]


class OtherItem(Part):
    """An item that means nothing to the model, such as a call of a tool that OpenAI ran."""

    type: str

    @model_validator(mode="after")
    def _is_taken(self) -> OtherItem:
        if (reason := REFUSED_ITEMS.get(self.type)) is not None:
            raise ValueError(f"items of type `{self.type}` are not offered: {reason}")
        return self


class FunctionTool(Part):
    """A function that the client runs."""

    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None


class CustomFormat(Part):
    """The form of a custom tool's input: the model is told of it, and nothing enforces it."""

    type: str
    syntax: str | None = None
    definition: str | None = None


class CustomTool(Part):
    """A tool that the client runs, whose input is a text."""

    type: Literal["custom"]
    name: ToolName
    description: str | None = None
    format: CustomFormat | None = None


def _tag_of(*known: str, missing: str = "other") -> Discriminator:
    """Return what tells the members of a union apart, by their field ``type``."""

    def tag(value: object) -> str:
        kind: object = missing
        if isinstance(value, dict):
            kind = value.get("type", missing)
        elif value is not None:
            kind = getattr(value, "type", missing)
        return kind if isinstance(kind, str) and kind in known else "other"

    return Discriminator(tag)


class OtherTool(Part):
    """A tool that OpenAI would run."""

    model_config = ConfigDict(extra="allow")
    type: Word

    @model_validator(mode="after")
    def _check_other_fields(self) -> OtherTool:
        """Keep them: the reply repeats the tool."""
        return self


OwnTool = Annotated[
    Annotated[FunctionTool, Tag("function")]
    | Annotated[CustomTool, Tag("custom")]
    | Annotated[OtherTool, Tag("other")],
    _tag_of("function", "custom"),
]


class NamespaceTool(Part):
    """Tools with a common name in front of theirs, such as those of one MCP server."""

    type: Literal["namespace"]
    name: ToolName
    description: str | None = None
    tools: Annotated[list[OwnTool], Field(max_length=MAX_AGENT_TOOLS, fail_fast=True)] = []


Tool = Annotated[
    Annotated[FunctionTool, Tag("function")]
    | Annotated[CustomTool, Tag("custom")]
    | Annotated[NamespaceTool, Tag("namespace")]
    | Annotated[OtherTool, Tag("other")],
    _tag_of("function", "custom", "namespace"),
]
Tools = Annotated[list[Tool], Field(max_length=MAX_AGENT_TOOLS, fail_fast=True)]


class ToolsItem(Part):
    """More tools."""

    type: Literal["additional_tools"]
    tools: Tools


_ITEMS = (
    *("message", "reasoning", "function_call", "custom_tool_call"),
    *("function_call_output", "custom_tool_call_output", "additional_tools"),
)
Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[CustomCallItem, Tag("custom_tool_call")]
    | Annotated[CallOutputItem, Tag("function_call_output")]
    | Annotated[CallOutputItem, Tag("custom_tool_call_output")]
    | Annotated[ToolsItem, Tag("additional_tools")]
    | Annotated[OtherItem, Tag("other")],
    _tag_of(*_ITEMS, missing="message"),
]


class ChosenTool(Part):
    """A tool by its name, or, as ``allowed_tools``, some of them."""

    type: Word
    name: Word | None = None
    namespace: Word | None = None
    mode: Literal["auto", "required"] | None = None
    tools: (
        Annotated[list[ChosenTool], Field(min_length=1, max_length=MAX_AGENT_TOOLS, fail_fast=True)]
        | None
    ) = None


class Reasoning(Part):
    """How much the model should think."""

    effort: Word | None = None
    summary: Word | None = None
    """Accepted without effect: thoughts are returned as they are."""


class TextFormat(Part):
    """The form that the answer must have."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: Json | None = Field(None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> TextFormat:
        if self.type == "json_schema" and self.schema_ is None:
            raise ValueError("a format of type json_schema has a schema")
        return self


class TextOptions(Part):
    """What the text of the answer is like."""

    format: TextFormat | None = None
    verbosity: Word | None = None
    """Accepted without effect."""


class ResponsesRequest(SamplingFields, CacheFields):
    """``POST /v1/responses``: OpenAI's fields, and the sampling fields that vLLM adds."""

    without_effect: ClassVar[frozenset[str]] = frozenset(
        ("access_programs", "client_metadata", "image", "max_tool_calls")
    )
    not_offered: ClassVar[dict[str, str]] = {
        "previous_response_id": NO_STORE,
        "conversation": NO_STORE,
        "background": "nothing is stored: wait for the answer, or stream it",
        "background_options": "nothing is stored: wait for the answer, or stream it",
        "prompt": "this server has no prompt templates: send `instructions` and `input`",
        "max_tokens": "its name here is `max_output_tokens`",
        "max_completion_tokens": "its name here is `max_output_tokens`",
        "response_format": "its name here is `text.format`",
        "reasoning_effort": "its name here is `reasoning.effort`",
        "logprobs": "`include` takes `message.output_text.logprobs`",
        "context_management": "nothing is compacted here: send a shorter `input`",
    }

    model: ModelName | None = None
    input: str | Annotated[list[Item], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    instructions: str | None = None
    max_output_tokens: MaxTokens | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    n: Literal[1] | None = None
    tools: Tools | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: TextOptions | None = None
    include: Annotated[list[str], Field(max_length=64, fail_fast=True)] | None = None
    store: bool | None = None
    """Whatever it says, nothing is stored, and the reply says so."""

    truncation: Literal["disabled"] | None = None
    metadata: Annotated[dict[Word, Word | float | bool | None], Field(max_length=64)] | None = None
    """Returned with the reply."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    chat_template_kwargs: Json | None = None
    request_id: RequestId | None = None
