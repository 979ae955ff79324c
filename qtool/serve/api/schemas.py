"""What the routes answer, for /openapi.json; replies are made as plain dictionaries, and tests hold
them to this.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from qtool.serve.api.fields import Json

FinishReason = Literal["stop", "length", "tool_calls", "abort"]
# the natural logarithm, the token, its text if that was asked for
NativeLogprob = tuple[float | None, int, str | None]


class Reply(BaseModel):
    """A part of a response."""

    model_config = ConfigDict(protected_namespaces=())


class ErrorDetail(Reply):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    """The field of the request."""

    code: str | None = None
    """Stays the same across releases."""


class ErrorReply(Reply):
    """Every response without status 2xx, in OpenAI's shape."""

    error: ErrorDetail


class CachedTokens(Reply):
    """What is known of the prompt's tokens."""

    cached_tokens: int


class Usage(Reply):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class TopLogprob(Reply):
    """A token that could have come."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token that came, and what could have come in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Reply):
    """Log probabilities of a chat's answer."""

    content: list[TokenLogprob]
    refusal: None = None


class CalledFunction(Reply):
    """What is called: ``arguments`` is JSON, as text."""

    name: str
    arguments: str


class Call(Reply):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class Answer(Reply):
    """The message of the model."""

    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    tool_calls: list[Call] | None = None


class ChatChoice(Reply):
    """One answer. ``matched_stop``: the stop string or token that ended it."""

    index: int
    message: Answer
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    matched_stop: str | int | None


class ChatCompletion(Reply):
    """The reply of ``POST /v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class CalledPart(Reply):
    """What has come of a call: the name is there once, the arguments in pieces."""

    name: str | None = None
    arguments: str | None = None


class CallPart(Reply):
    """A piece of the call number ``index``."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledPart


class Delta(Reply):
    """What a message has got since the event before."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[CallPart] | None = None


class ChatChunkChoice(Reply):
    """A piece of one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    matched_stop: str | int | None = None


class ChatChunk(Reply):
    """An event of a chat that is streamed; the last one may have the usage, and no choice."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class CompletionLogprobs(Reply):
    """Log probabilities of a completion: one entry for each token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(Reply):
    """One text. ``matched_stop``: the stop string or token that ended it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    matched_stop: str | int | None


class Completion(Reply):
    """The reply of ``POST /v1/completions``."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunkChoice(Reply):
    """A piece of one text."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    matched_stop: str | int | None = None


class CompletionChunk(Reply):
    """An event of a completion that is streamed; the last one may have the usage, and no choice."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChunkChoice]
    usage: Usage | None = None


class GenerationFacts(Reply):
    """SGLang's ``meta_info``. ``finish_reason``: its ``type``, and what matched."""

    id: str
    finish_reason: Json | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None = None
    e2e_latency: float | None = Field(None, description="Seconds.")
    input_token_logprobs: list[NativeLogprob] | None = None
    output_token_logprobs: list[NativeLogprob] | None = None
    input_top_logprobs: list[list[NativeLogprob] | None] | None = None
    output_top_logprobs: list[list[NativeLogprob] | None] | None = None


class Generation(Reply):
    """One of what ``POST /generate`` replies."""

    text: str
    output_ids: list[int]
    meta_info: GenerationFacts


class GenerationChunk(Generation):
    """An event of a generation that is streamed: all there is so far, and which of several
    it is.
    """

    index: int | None = None


class Success(Reply):
    """Done."""

    success: bool


class Status(Reply):
    """The server answers."""

    status: Literal["ok"]


class Version(Reply):
    """What serves."""

    version: str


class Tokens(Reply):
    """The reply of ``POST /tokenize``; lists of lists for several prompts."""

    tokens: list[int] | list[list[int]]
    count: int | list[int]
    max_model_len: int


class Text(Reply):
    """The reply of ``POST /detokenize``: the same under the names that SGLang and vLLM have for it;
    lists for several lists of tokens.
    """

    text: str | list[str]
    prompt: str | list[str]


class Model(Reply):
    """A served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None = None
    max_model_len: int


class Models(Reply):
    """The reply of ``GET /v1/models``."""

    object: Literal["list"]
    data: list[Model]


class ModelInfo(Reply):
    """The reply of ``GET /get_model_info``."""

    model_path: str
    tokenizer_path: str
    is_generation: bool


class ServerInfo(Reply):
    """The reply of ``GET /get_server_info``: flags, facts, and what the server does now."""

    model_path: str
    served_model_name: str
    version: str
    status: str
    max_total_num_tokens: int
    internal_states: list[Json]


CHUNKS = (ChatChunk, CompletionChunk, GenerationChunk, ErrorReply)
