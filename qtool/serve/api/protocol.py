"""The bodies of requests: OpenAI's fields, those that vLLM and SGLang both add, and SGLang's native
ones; all others are in `other_fields`, which has the sources.

Bounds stand in the fields, so that nothing large is tokenized first; what depends on the model is
checked by `SamplingParams` and the engine.
"""

from __future__ import annotations

import json
from typing import Annotated, ClassVar, Literal, Self, TypeVar

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from qtool.engine.sampling_params import LARGEST, MAX_IDS, MAX_TOP_LOGPROBS
from qtool.serve.api.body import Body, Part
from qtool.serve.api.fields import (
    MAX_CHOICES,
    MAX_MESSAGES,
    MAX_PARTS,
    MAX_PROMPTS,
    MAX_TOOLS,
    CacheSalt,
    Grammar,
    Json,
    LogitBias,
    MaxTokens,
    MaxTokensOrZero,
    ModelName,
    Prompt,
    RequestId,
    Seed,
    StopStrings,
    TokenId,
    TokenLists,
    TokenListsOrEmpty,
    ToolName,
    Whole,
    bounded,
)

# word in the type of a content part -> what it is
OTHER_CONTENT = {"image": "images", "audio": "audio", "video": "videos", "file": "files"}


class StreamOptions(Body):
    """Options of a streamed answer."""

    include_usage: bool | None = None
    """Whether a last chunk gives the number of tokens."""

    continuous_usage_stats: bool | None = None
    """Whether each chunk gives the number of tokens so far, with ``include_usage`` (as in vLLM)."""

    include_obfuscation: bool | None = None
    """Whether OpenAI pads its events; there is no padding here."""


class JsonSchema(Body):
    """A JSON schema that the answer must satisfy."""

    name: str | None = None
    description: str | None = None
    schema_: Json | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """The form that the answer must have."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchema | None = None
    structures: Annotated[list[Json], Field(max_length=MAX_PARTS, fail_fast=True)] | None = (
        None  # of a structural_tag
    )
    triggers: Annotated[list[str], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    format: Json | None = None


class StructuredOutputs(Body):
    """vLLM's constraints of an answer; only one of them may be given."""

    json_: Json | Grammar | None = Field(None, alias="json")
    regex: Grammar | None = None
    choice: Annotated[list[str], Field(min_length=1, max_length=1024, fail_fast=True)] | None = None
    grammar: Grammar | None = None
    json_object: bool | None = None
    structural_tag: Grammar | None = None


class CacheFields(Body):
    """What keeps the prompts of some clients apart from those of others in the prefix cache."""

    cache_salt: CacheSalt | None = None
    """vLLM's."""
    extra_key: CacheSalt | None = None
    """SGLang's, which counts both."""

    @property
    def salt(self) -> str:
        """Both as one."""
        return one_salt(self.cache_salt, self.extra_key)


def one_salt(cache_salt: str | None, extra_key: str | None) -> str:
    """Return both as one; "" where there is neither."""
    return json.dumps([cache_salt, extra_key]) if cache_salt or extra_key else ""


class SamplingFields(Body):
    """Sampling fields with the same names on OpenAI's and SGLang's routes."""

    temperature: Annotated[float, bounded("temperature")] | None = None
    top_p: Annotated[float, bounded("top_p")] | None = None
    top_k: Annotated[Whole, bounded("top_k")] | None = None
    min_p: Annotated[float, bounded("min_p")] | None = None
    frequency_penalty: Annotated[float, bounded("frequency_penalty")] | None = None
    presence_penalty: Annotated[float, bounded("presence_penalty")] | None = None
    repetition_penalty: Annotated[float, bounded("repetition_penalty")] | None = None
    logit_bias: LogitBias | None = None
    seed: Seed | None = None
    n: Annotated[Whole, bounded("n")] | None = None
    stop: StopStrings | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_IDS, fail_fast=True)] | None = (
        None
    )
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None  # accepted without effect
    no_stop_trim: bool | None = None  # SGLang's name, accepted everywhere
    regex: Grammar | None = None
    ebnf: Grammar | None = None
    json_schema: Grammar | None = None


class OpenAISamplingFields(SamplingFields, CacheFields):
    """The fields that chats and completions share."""

    model: ModelName | None = None
    min_tokens: Annotated[Whole, bounded("min_new_tokens")] | None = None
    include_stop_str_in_output: bool | None = None  # vLLM's name of no_stop_trim
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None  # vLLM's
    rid: RequestId | None = None
    request_id: RequestId | None = None
    """vLLM's name of ``rid``."""

    @model_validator(mode="after")
    def _take_request_id(self) -> Self:
        self.rid = self.rid or self.request_id
        return self


class TextPart(Part):
    """A piece of a message."""

    type: Literal["text", "input_text", "refusal"]
    text: str | None = None
    refusal: str | None = None

    @model_validator(mode="after")
    def _has_text(self) -> TextPart:
        if (self.refusal if self.type == "refusal" else self.text) is None:
            raise ValueError(f"a part of type {self.type} has no text")
        return self


def check_content(value: object) -> object:
    """Refuse images, audio and files by their name, which the types below would not mention."""
    for part in value if isinstance(value, list) else ():
        kind = part.get("type") if isinstance(part, dict) else None
        for word, what in OTHER_CONTENT.items():
            if isinstance(kind, str) and word in kind:
                message = (
                    "{what} are not offered: this server reads only text, and no part of type "
                    "`{kind}`"
                )
                raise PydanticCustomError(
                    "content_not_supported", message, {"what": what, "kind": kind[:100]}
                )
    return value


class FunctionCall(Part):
    """A call that the model made."""

    name: str
    arguments: str | Json | None = None
    """JSON, usually as text."""


class ToolCall(Part):
    """A call in a message of the model."""

    id: str | None = None
    type: Literal["function"] = "function"
    index: int | None = None
    function: FunctionCall


class Message(Part):
    """One turn of a chat; images, audio and files are refused."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[
        str | Annotated[list[TextPart], Field(max_length=MAX_PARTS, fail_fast=True)] | None,
        BeforeValidator(check_content),
    ] = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    """vLLM's name of reasoning_content."""
    refusal: str | None = None
    function_call: FunctionCall | None = None


class Function(Part):
    """A function that the model may call."""

    name: ToolName
    description: str | None = None
    parameters: Json | None = None
    """The JSON schema of its arguments."""

    strict: bool | None = None


class Tool(Part):
    """A tool, which is always a function."""

    type: Literal["function"]
    function: Function


class FunctionName(Part):
    """A function by its name."""

    name: ToolName


class NamedTool(Part):
    """The tool that must be called."""

    type: Literal["function"]
    function: FunctionName


class Allowed(Part):
    """The tools that may be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)]


class AllowedTools(Part):
    """A choice among some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: Allowed


class TemplateFields(Body):
    """What a chat template makes a prompt of, besides messages."""

    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedTools | None = None
    documents: Annotated[list[Json], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    reasoning_effort: str | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Json | None = None


class ChatRequest(TemplateFields, OpenAISamplingFields):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    parallel_tool_calls: bool | None = None
    separate_reasoning: bool | None = None
    """Whether thoughts are told from content (SGLang's); they are without it."""
    stream_reasoning: bool | None = None
    """Whether a stream has thoughts as they come (SGLang's); it has without it."""
    include_reasoning: bool | None = None
    """Whether thoughts are returned (vLLM's); they are without it."""
    modalities: (
        Annotated[list[Literal["text"]], Field(max_length=MAX_PARTS, fail_fast=True)] | None
    ) = None


class CompletionRequest(OpenAISamplingFields):
    """``POST /v1/completions``."""

    prompt: Prompt
    max_tokens: MaxTokensOrZero | None = None
    logprobs: Annotated[Whole, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Annotated[Whole, Field(ge=1, le=MAX_CHOICES)] | None = None
    add_special_tokens: bool | None = None


class NativeSampling(SamplingFields):
    """SGLang's ``sampling_params``, whose unknown names SGLang refuses, too."""

    ignores_unknown: ClassVar[bool] = False
    max_new_tokens: MaxTokensOrZero | None = None
    min_new_tokens: Annotated[Whole, bounded("min_new_tokens")] | None = None
    sampling_seed: Seed | None = None
    structural_tag: Grammar | None = None


T = TypeVar("T")
Each = Annotated[list[T], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
LogprobStart = Annotated[Whole, Field(ge=-1, le=LARGEST)]
LogprobCount = Annotated[Whole, Field(ge=0, le=MAX_TOP_LOGPROBS)]


class GenerateRequest(Body):
    """``POST /generate``, SGLang's native request."""

    text: (
        Annotated[
            str | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)],
            Field(),
        ]
        | None
    ) = None
    input_ids: TokenLists | None = None
    sampling_params: NativeSampling | Each[NativeSampling] | None = None
    """This and the next six are for all prompts, or one for each."""
    rid: RequestId | Each[RequestId] | None = None
    cache_salt: CacheSalt | Each[CacheSalt | None] | None = None
    extra_key: CacheSalt | Each[CacheSalt | None] | None = None
    return_logprob: bool | Each[bool | None] | None = None
    logprob_start_len: LogprobStart | Each[LogprobStart | None] | None = None
    top_logprobs_num: LogprobCount | Each[LogprobCount | None] | None = None
    stream: bool | None = None
    return_text_in_logprobs: bool | None = None


class AbortRequest(Body):
    """``POST /abort_request``."""

    rid: RequestId | None = None
    """The id of the requests to abort."""

    abort_all: bool | None = None
    """Whether all requests are aborted."""


class TokenizeRequest(TemplateFields):
    """``POST /tokenize``: a ``prompt``, or ``messages`` for the chat template."""

    model: ModelName | None = None
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | None
    ) = None
    messages: (
        Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
        | None
    ) = None
    return_token_strs: bool | None = None
    """Whether the names of the tokens are returned."""

    add_special_tokens: bool | None = None


class DetokenizeRequest(Body):
    """``POST /detokenize``."""

    model: ModelName | None = None
    tokens: TokenListsOrEmpty
    skip_special_tokens: bool | None = None
