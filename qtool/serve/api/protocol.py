"""What requests hold, and errors: OpenAI's fields, those that vLLM and SGLang both add, and
SGLang's native ones. Unknown fields are refused.

Bounds stand here so that nothing large is tokenized first; what depends on the model is checked by
`SamplingParams` and the engine.
Sources: OpenAI's API reference; vLLM 0.33 `entrypoints/openai/`; SGLang 0.5.23
    `srt/entrypoints/openai/protocol.py`, `srt/managers/io_struct.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from qtool.engine.sampling_params import (
    ABOVE_ZERO,
    LARGEST,
    MAX_IDS,
    MAX_STOP_LENGTH,
    MAX_STOP_STRINGS,
    MAX_TOP_LOGPROBS,
    RANGES,
)
from qtool.errors import nearest, one_line

MAX_CHOICES = int(RANGES["n"][1])
MAX_PROMPTS = 1024
MAX_MESSAGES = 4096
MAX_PARTS = 4096
MAX_TOOLS = 128
MAX_ERRORS = 100  # of one body that are looked at
# word in the type of a part -> what it is
OTHER_CONTENT = {
    "image": "images",
    "audio": "audio",
    "video": "videos",
    "file": "files",
}
# pydantic's -> OpenAI's
CODES = {
    "extra_forbidden": "unknown_parameter",
    "missing": "missing_required_parameter",
}


Json = dict[str, object]


def bounded(name: str) -> Any:
    """Return the bounds of the sampling field ``name``, those of `SamplingParams`."""
    low, high = RANGES[name]
    return Field(gt=low, le=high) if name in ABOVE_ZERO else Field(ge=low, le=high)


Token = Annotated[int, Field(ge=0, le=LARGEST)]
Stop = (
    str
    | Annotated[
        list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]],
        Field(max_length=MAX_STOP_STRINGS, fail_fast=True),
    ]
)
Seed = Annotated[int, bounded("sampling_seed")]
RequestId = Annotated[str, Field(pattern=r"^[!-~]{1,200}$")]  # the log has it
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


def _prompt(value: Any) -> Any:
    """Accept text, texts, tokens or lists of tokens; found out by hand, for a union would report on
    each of a million tokens.
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise ValueError(
            "a prompt is a text, a list of texts, a list of tokens, or a list of lists of "
            "tokens, and not empty"
        )
    if _tokens(value):
        return value
    if len(value) > MAX_PROMPTS:
        raise ValueError(f"at most {MAX_PROMPTS} prompts")
    if not (
        all(type(one) is str for one in value)
        or all(isinstance(one, list) and one and _tokens(one) for one in value)
    ):
        raise ValueError(
            "prompts are all texts, or all lists of tokens, which are whole numbers from 0 on; "
            "none is empty"
        )
    return value


def _tokens(value: list[Any]) -> bool:
    return all(type(one) is int and 0 <= one <= LARGEST for one in value)


_IDS = {
    "type": "array",
    "items": {"type": "integer", "minimum": 0, "maximum": LARGEST},
    "minItems": 1,
}
Prompt = Annotated[
    Any,
    BeforeValidator(_prompt),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "array",
                    "items": {"type": "string"},
                    "minItems": 1,
                    "maxItems": MAX_PROMPTS,
                },
                _IDS,
                {"type": "array", "items": _IDS, "minItems": 1, "maxItems": MAX_PROMPTS},
            ]
        }
    ),
]


def _ids(value: Any) -> Any:
    """Accept tokens or lists of them."""
    value = _prompt(value)
    if isinstance(value, str) or isinstance(value[0], str):
        raise ValueError("tokens are whole numbers and no text, in a list or in lists")
    return value


Ids = Annotated[
    Any,
    BeforeValidator(_ids),
    WithJsonSchema(
        {"anyOf": [_IDS, {"type": "array", "items": _IDS, "minItems": 1, "maxItems": MAX_PROMPTS}]}
    ),
]


def _few(value: Any) -> Any:
    """Refuse what is too long before each entry of it is looked at."""
    if isinstance(value, dict) and len(value) > MAX_IDS:
        raise ValueError(f"at most {MAX_IDS} entries")
    return value


LogitBias = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,10}$")], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=MAX_IDS),
    BeforeValidator(_few),
]


class Body(BaseModel):
    """A part of a request: strict types, no field that is unknown."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=()
    )


class Reply(BaseModel):
    """A part of a response."""

    model_config = ConfigDict(protected_namespaces=())


class StreamOptions(Body):
    """``include_usage``: a last chunk with the number of tokens."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # OpenAI's padding against listeners: there is none


class JsonSchema(Body):
    """A schema that the answer must satisfy."""

    name: str | None = None
    description: str | None = None
    schema_: Json | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """What form the answer must have."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchema | None = None
    structures: Annotated[list[Json], Field(max_length=MAX_PARTS, fail_fast=True)] | None = (
        None  # of a structural_tag
    )
    triggers: Annotated[list[str], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    format: Json | None = None


class StructuredOutputs(Body):
    """vLLM's way to constrain an answer; one of them."""

    json_: Json | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1, max_length=1024, fail_fast=True)] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None


class Draw(Body):
    """What OpenAI's routes and SGLang's ask of the sampler under the same names."""

    temperature: Annotated[float, bounded("temperature")] | None = None
    top_p: Annotated[float, bounded("top_p")] | None = None
    top_k: Annotated[int, bounded("top_k")] | None = None
    min_p: Annotated[float, bounded("min_p")] | None = None
    frequency_penalty: Annotated[float, bounded("frequency_penalty")] | None = None
    presence_penalty: Annotated[float, bounded("presence_penalty")] | None = None
    repetition_penalty: Annotated[float, bounded("repetition_penalty")] | None = None
    logit_bias: LogitBias | None = None
    seed: Seed | None = None
    n: Annotated[int, bounded("n")] | None = None
    stop: Stop | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=MAX_IDS, fail_fast=True)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None  # taken, and without effect
    no_stop_trim: bool | None = None  # SGLang's name, everywhere
    regex: str | None = None
    ebnf: str | None = None
    json_schema: str | None = None


class Sampling(Draw):
    """The fields that chats and completions share."""

    model: str | None = None
    min_tokens: Annotated[int, bounded("min_new_tokens")] | None = None
    include_stop_str_in_output: bool | None = None  # vLLM's name of no_stop_trim
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None  # vLLM's
    rid: RequestId | None = None
    user: str | None = None  # from here on: taken, and without effect
    metadata: Json | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: Json | None = None


class TextPart(Body):
    """A piece of a message."""

    type: Literal["text", "input_text", "refusal"]
    text: str | None = None
    refusal: str | None = None

    @model_validator(mode="after")
    def _has_text(self) -> TextPart:
        if (self.refusal if self.type == "refusal" else self.text) is None:
            raise ValueError(f"a part of type {self.type} has no text")
        return self


def _content(value: Any) -> Any:
    """Refuse parts that are no text by their name; the types below would only say what they are
    not.
    """
    for part in value if isinstance(value, list) else ():
        kind = part.get("type") if isinstance(part, dict) else None
        for word, what in OTHER_CONTENT.items():
            if isinstance(kind, str) and word in kind:
                message = (
                    "{what} are not taken, for this server reads text: a part of type `{kind}` "
                    "cannot be answered"
                )
                raise PydanticCustomError(
                    "content_not_supported", message, {"what": what, "kind": kind[:100]}
                )
    return value


class FunctionCall(Body):
    """A call that the model made: the arguments are JSON, as text."""

    name: str
    arguments: str | Json | None = None


class ToolCall(Body):
    """A call in a message of the model."""

    id: str | None = None
    type: Literal["function"] = "function"
    index: int | None = None
    function: FunctionCall


class Message(Body):
    """One turn of a chat.

    ``content`` is text or a list of text parts; images, audio and files are refused.
    """

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[
        str | Annotated[list[TextPart], Field(max_length=MAX_PARTS, fail_fast=True)] | None,
        BeforeValidator(_content),
    ] = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    audio: None = None
    annotations: Annotated[list[Json], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    function_call: FunctionCall | None = None


class Function(Body):
    """A function that the model may call. ``parameters`` is a JSON schema."""

    name: Name
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool: only functions are known."""

    type: Literal["function"]
    function: Function


class FunctionName(Body):
    """A function by its name."""

    name: Name


class NamedTool(Body):
    """The tool that must be called."""

    type: Literal["function"]
    function: FunctionName


class Allowed(Body):
    """Those of the tools that may be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)]


class AllowedTools(Body):
    """A choice among some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: Allowed


class ChatRequest(Sampling):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: Annotated[list[Json], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    chat_template_kwargs: Json | None = None
    reasoning_effort: str | None = None
    modalities: (
        Annotated[list[Literal["text"]], Field(max_length=MAX_PARTS, fail_fast=True)] | None
    ) = None
    verbosity: str | None = None  # taken, and without effect, as is the next
    prediction: Json | None = None


def _suffix(value: Any) -> Any:
    if value not in (None, ""):
        raise ValueError(
            "text is continued, and not filled in; a model that can fill in has tokens for it to "
            "write into the prompt"
        )
    return value


class CompletionRequest(Sampling):
    """``POST /v1/completions``."""

    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    suffix: Annotated[Literal[""] | None, BeforeValidator(_suffix)] = None
    add_special_tokens: bool | None = None


class NativeSampling(Draw):
    """SGLang's ``sampling_params``."""

    max_new_tokens: Annotated[int, Field(ge=0, le=LARGEST)] | None = None
    min_new_tokens: Annotated[int, bounded("min_new_tokens")] | None = None
    sampling_seed: Seed | None = None
    structural_tag: str | None = None


class GenerateRequest(Body):
    """``POST /generate``, SGLang's native request."""

    text: (
        Annotated[
            str | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)],
            Field(),
        ]
        | None
    ) = None
    input_ids: Ids | None = None
    sampling_params: NativeSampling | None = None
    rid: RequestId | None = None
    stream: bool | None = None
    return_logprob: bool | None = None
    logprob_start_len: Annotated[int, Field(ge=-1, le=LARGEST)] | None = None
    top_logprobs_num: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    return_text_in_logprobs: bool | None = None


class AbortRequest(Body):
    """``POST /abort_request``: ``rid`` of the requests to end."""

    rid: RequestId


class TokenizeRequest(Body):
    """``POST /tokenize``: a ``prompt``, or ``messages`` through the chat template."""

    model: str | None = None
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | None
    ) = None
    messages: (
        Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
        | None
    ) = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Json | None = None


class DetokenizeRequest(Body):
    """``POST /detokenize``."""

    model: str | None = None
    tokens: Ids
    skip_special_tokens: bool | None = None


class ErrorDetail(Reply):
    """What went wrong: ``param`` is the field, ``code`` is stable."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(Reply):
    """Every answer that is not 2xx, as OpenAI has it."""

    error: ErrorDetail


def refusal(errors: Sequence[Mapping[str, Any]], model: type[BaseModel]) -> ErrorDetail:
    """Return what pydantic's ``errors`` in a body of ``model`` mean: which field, what it takes,
    and the nearest name of one that is unknown.

    Of several errors it tells the innermost: those of a union's other members are further out.
    """
    placed = [(*_place(error, model), error) for error in errors[:MAX_ERRORS]]
    path, known, error = max(
        placed, key=lambda one: (len(one[0]), one[2]["type"] == "extra_forbidden")
    )
    kind = str(error["type"])
    field = "".join(
        f"[{step}]" if isinstance(step, int) else f".{step[:100]}" for step in path
    ).removeprefix(".")
    if kind == "extra_forbidden":
        hint = nearest(str(path[-1])[:100], known, count=1)
        message = f"there is no field `{field}`" + (f"; {hint}" if hint else "")
    elif kind == "missing":
        message = f"`{field}` is missing" if field else "the request has no body"
    else:
        same = dict.fromkeys(_said(other) for place, _, other in placed if place == path)
        message = f"`{field}`: {', or '.join(same)}" if field else ", or ".join(same)
    return ErrorDetail(
        message=message,
        type="invalid_request_error",
        param=field or None,
        code=CODES.get(kind, kind),
    )


def _place(
    error: Mapping[str, Any], model: type[BaseModel]
) -> tuple[list[str | int], Iterable[str]]:
    """Return the way to the field of ``error``, without the names of a union's members, and the
    names of fields known there.
    """
    path: list[str | int] = []
    models, known = {model}, set[str]()
    *way, last = error["loc"] or ("",)
    for step in [*way[way[:1] == ["body"] :], last]:
        if isinstance(step, int):
            path.append(step)
            continue
        fields = {
            field.alias or name: field for one in models for name, field in one.model_fields.items()
        }
        if step in fields:
            path.append(step)
            models = _models(fields[step].annotation)
        elif step is last and error["type"] == "extra_forbidden":
            path.append(step)
            known = set(fields)
    return path, known


def _models(annotation: Any) -> set[type[BaseModel]]:
    """Return the models that a value of this type may be, or hold."""
    if arguments := get_args(annotation):
        return {model for argument in arguments for model in _models(argument)}
    return (
        {annotation}
        if isinstance(annotation, type) and issubclass(annotation, BaseModel)
        else set()
    )


def _said(error: Mapping[str, Any]) -> str:
    """Return what is wrong, in JSON's words."""
    text = one_line(Exception(error["msg"].removeprefix("Value error, ")))
    return re.sub(
        r"a valid dictionary( or instance of \w+| or object to extract fields from)?",
        "an object",
        text,
    )
