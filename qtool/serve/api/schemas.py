"""What the routes reply: schemas for /openapi.json that also encode the replies.

Generated text is in msgspec structs, encoded as they are; the rest is in pydantic models, which
FastAPI needs.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Struct, UnsetType
from pydantic import AfterValidator, BaseModel, ConfigDict

from qtool.engine import outputs
from qtool.serve.api.fields import Json

MAX_MESSAGE = 2000  # characters of an error
FinishReason = Literal["stop", "length", "tool_calls", "abort"]
NativeLogprob = tuple[float | None, int, str | None]
"""The natural logarithm, the token, and its text if that was requested."""


class CachedTokens(Struct):
    """What is known of the prompt's tokens."""

    cached_tokens: int


class CompletionDetails(Struct):
    """What the tokens of an answer were."""

    reasoning_tokens: int = 0
    """Tokens of thoughts."""
    accepted_prediction_tokens: int | UnsetType = UNSET
    """Where tokens are drafted, like the next."""
    rejected_prediction_tokens: int | UnsetType = UNSET


class Usage(Struct):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: CompletionDetails | UnsetType = UNSET
    """Where tokens are drafted, or thoughts are told apart."""


class TopLogprob(Struct, gc=False):  # there may be a hundred thousand, and no cycles
    """A likely token."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob, gc=False):
    """A token of the answer, and the most likely ones in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct):
    """Log probabilities of a chat's answer."""

    content: list[TokenLogprob]
    refusal: None = None


class CalledFunction(Struct):
    """The function that is called."""

    name: str
    arguments: str
    """JSON, as text."""


class Call(Struct):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class Answer(Struct):
    """The message of the model."""

    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    reasoning_content: str | None = None
    """Thoughts; null where there are none, which clients of SGLang read."""
    reasoning: str | None = None
    """The same, for clients of vLLM."""
    tool_calls: list[Call] | UnsetType = UNSET


class ChatChoice(Struct):
    """One answer."""

    index: int
    message: Answer
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    matched_stop: str | int | None
    """The stop string or token that ended it."""


class ChatCompletion(Struct):
    """The reply of ``POST /v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class CalledPart(Struct):
    """A piece of a call: the first has the name, each a part of the arguments."""

    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET


class CallPart(Struct, kw_only=True):
    """A piece of the call number ``index``; the first has its id and type."""

    index: int
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    function: CalledPart


class Delta(Struct):
    """What a message has gained since the event before."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | None = None
    """Thoughts; null where there are none, which clients of SGLang read."""
    reasoning: str | UnsetType = UNSET
    """The same, for clients of vLLM."""
    tool_calls: list[CallPart] | UnsetType = UNSET


class ChatChunkChoice(Struct):
    """A piece of one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    matched_stop: str | int | UnsetType | None = UNSET


class ChatChunk(Struct):
    """An event of a streamed chat; the last may have the usage, and no choice."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET


class CompletionLogprobs(Struct):
    """Log probabilities of a completion: one entry for each token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float | None] | None]
    text_offset: list[int]


class CompletionChoice(Struct):
    """One text."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    matched_stop: str | int | None
    """The stop string or token that ended it."""


class Completion(Struct):
    """The reply of ``POST /v1/completions``."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunkChoice(Struct):
    """A piece of one text."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    matched_stop: str | int | UnsetType | None = UNSET


class CompletionChunk(Struct):
    """An event of a streamed completion; the last may have the usage, and no choice."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChunkChoice]
    usage: Usage | UnsetType | None = UNSET


class GenerationFacts(Struct, kw_only=True):
    """SGLang's ``meta_info``."""

    id: str
    finish_reason: outputs.FinishReason | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | UnsetType = UNSET
    e2e_latency: float | UnsetType = UNSET
    """Seconds."""
    spec_verify_ct: int | UnsetType = UNSET
    """Steps after the prompt; this field and the next four are there where tokens are drafted."""
    spec_accept_length: float | UnsetType = UNSET
    """Mean tokens of such a step."""
    spec_accept_rate: float | UnsetType = UNSET
    """Share of drafted tokens that were accepted."""
    spec_num_proposed_drafts: int | UnsetType = UNSET
    """Tokens drafted."""
    spec_num_correct_drafts: int | UnsetType = UNSET
    """Of these, accepted."""
    output_token_logprobs: list[NativeLogprob] | UnsetType = UNSET
    output_top_logprobs: list[list[NativeLogprob] | None] | UnsetType = UNSET
    input_token_logprobs: list[NativeLogprob] | UnsetType = UNSET
    input_top_logprobs: list[list[NativeLogprob] | None] | UnsetType = UNSET


class Generation(Struct):
    """One of the replies of ``POST /generate``."""

    text: str
    output_ids: list[int]
    meta_info: GenerationFacts


class GenerationChunk(Generation):
    """An event of a streamed generation: all of one text so far."""

    index: int | UnsetType = UNSET
    """Which of several texts."""


class Info(BaseModel):
    """A reply about the server, or a part of one."""

    model_config = ConfigDict(protected_namespaces=())


def _shorten(message: str) -> str:
    """Cut what repeats too much of a request."""
    return message if len(message) <= MAX_MESSAGE else f"{message[:MAX_MESSAGE]} ..."


class ErrorDetail(Info):
    """What went wrong."""

    message: Annotated[str, AfterValidator(_shorten)]
    type: str
    param: str | None = None
    """The field of the request."""

    code: str | None = None
    """Stays the same across releases."""


class ErrorReply(Info):
    """Every response without status 2xx, in OpenAI's shape."""

    error: ErrorDetail


class Success(Info):
    """The request was done."""

    success: bool


class Status(Info):
    """The server answers."""

    status: Literal["ok"]


class Version(Info):
    """The version of qtool."""

    version: str


class Tokens(Info):
    """The reply of ``POST /tokenize``; lists of lists for several prompts."""

    tokens: list[int] | list[list[int]]
    count: int | list[int]
    max_model_len: int
    token_strs: list[str] | list[list[str]] | None = None
    """The tokens' names in the vocabulary, with ``return_token_strs``."""


class Text(Info):
    """The reply of ``POST /detokenize``, under SGLang's name and vLLM's; lists for several lists of
    tokens.
    """

    text: str | list[str]
    prompt: str | list[str]


class Model(Info):
    """A served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None = None
    max_model_len: int
    type: Literal["model"]
    """With the next three, what Anthropic's clients read."""
    display_name: str
    created_at: str
    max_input_tokens: int


class Models(Info):
    """The reply of ``GET /v1/models``."""

    object: Literal["list"]
    data: list[Model]


class ModelInfo(Info):
    """The reply of ``GET /get_model_info``."""

    model_path: str
    tokenizer_path: str
    is_generation: bool


class ServerInfo(Info):
    """The reply of ``GET /get_server_info``: settings, the engine, and what the server is doing."""

    model_path: str
    served_model_name: str
    version: str
    status: str
    max_total_num_tokens: int
    page_size: int
    internal_states: list[Json]


GENERATED = (
    ChatCompletion,
    ChatChunk,
    Completion,
    CompletionChunk,
    Generation,
    GenerationChunk,
)
