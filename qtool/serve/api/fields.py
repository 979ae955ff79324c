"""Types of the fields of requests, with their bounds; those of sampling are `SamplingParams`'."""

from __future__ import annotations

import re
from typing import Annotated, cast

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, WithJsonSchema
from pydantic.fields import FieldInfo

from qtool.engine.sampling_params import (
    ABOVE_ZERO,
    BIASES,
    LARGEST,
    MAX_GRAMMAR,
    MAX_IDS,
    MAX_STOP_LENGTH,
    MAX_STOP_STRINGS,
    RANGES,
    TOKEN_IDS,
    is_grammar,
    is_token_id,
)

MAX_CHOICES = int(RANGES["n"][1])
MAX_PROMPTS = 1024
MAX_MESSAGES = 4096
MAX_PARTS = 4096
MAX_TOOLS = 128  # OpenAI's limit
MAX_AGENT_TOOLS = 512  # of routes for agents, which bring those of MCP servers along
Json = dict[str, object]
Tokens = list[int]


def bounded(name: str) -> FieldInfo:
    """Return the bounds of the sampling field ``name`` in `SamplingParams`."""
    low, high = RANGES[name]
    field: FieldInfo = Field(gt=low, le=high) if name in ABOVE_ZERO else Field(ge=low, le=high)
    return field


def _check_grammar(text: str) -> str:
    if not is_grammar(text):
        raise ValueError(f"a grammar has 1 to {MAX_GRAMMAR} bytes of valid Unicode")
    return text


def _whole(value: object) -> object:
    """Return a whole number that was written as 16.0 as the number that it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def without_empty(value: object) -> object:
    """Leave out empty strings of a list: they ask for no stop."""
    return [one for one in value if one != ""] if isinstance(value, list) else value


def _check_bias_key(key: str) -> str:
    if not (re.fullmatch("[0-9]{1,10}", key) and is_token_id(int(key))):
        message = f"{key[:40]!r} is not a token id: these are whole numbers from {TOKEN_IDS[0]} to"
        raise ValueError(f"{message} {TOKEN_IDS[1]}")
    return key


def _check_bias_count(value: object) -> object:
    """Refuse too many entries before each of them is checked."""
    if isinstance(value, dict) and len(value) > MAX_IDS:
        raise ValueError(f"at most {MAX_IDS} entries")
    return value


def check_prompt(value: object, most: int = MAX_PROMPTS) -> PromptInput:
    """Accept a text, texts, tokens or lists of tokens; checked by hand, because a union would
    report on each of a million tokens.
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise ValueError(
            "a prompt is a text, a list of texts, a list of tokens, or a list of lists of "
            "tokens, and not empty"
        )
    if _are_tokens(value):
        return value
    if len(value) > most:
        raise ValueError(f"at most {most} prompts")
    if not (all(type(one) is str for one in value) or all(map(_is_token_list, value))):
        raise ValueError(
            "prompts are all texts, or all lists of tokens, which are whole numbers from 0 on; "
            "none is empty"
        )
    return value


def _check_tokens(value: object) -> TokensInput:
    """Accept tokens or lists of tokens."""
    given = check_prompt(value)
    if not are_tokens(given):
        raise ValueError("tokens are whole numbers and no text, in a list or in lists")
    return cast(TokensInput, given)


def are_tokens(given: PromptInput) -> bool:
    """Whether ``given``, which is not empty, is tokens and no text."""
    return not isinstance(given, str) and not isinstance(given[0], str)


def is_single(prompt: PromptInput) -> bool:
    """Whether ``prompt`` is one text or one list of tokens, which may be empty."""
    return isinstance(prompt, str) or not prompt or isinstance(prompt[0], int)


def as_prompts(given: PromptInput) -> list[PromptOrTokens]:
    """Return ``given`` as a list of prompts, also if there is only one."""
    return cast(list[PromptOrTokens], [given] if is_single(given) else given)


def as_lists(tokens: TokensInput) -> list[Tokens]:
    """Return ``tokens`` as a list of lists, also if there is only one."""
    return cast(list[Tokens], [tokens] if is_single(tokens) else tokens)


def _are_tokens(value: list[object]) -> bool:
    return all(type(one) is int and 0 <= one <= LARGEST for one in value)


def _is_token_list(value: object) -> bool:
    return isinstance(value, list) and bool(value) and _are_tokens(value)


_TOKENS_SCHEMA: Json = {
    "type": "array",
    "items": {"type": "integer", "minimum": 0, "maximum": LARGEST},
    "minItems": 1,
}
_TOKEN_LISTS_SCHEMA: Json = {
    "type": "array",
    "items": _TOKENS_SCHEMA,
    "minItems": 1,
    "maxItems": MAX_PROMPTS,
}
_TEXTS_SCHEMA: Json = {
    "type": "array",
    "items": {"type": "string"},
    "minItems": 1,
    "maxItems": MAX_PROMPTS,
}

PROMPT_SCHEMA: Json = {
    "anyOf": [{"type": "string"}, _TEXTS_SCHEMA, _TOKENS_SCHEMA, _TOKEN_LISTS_SCHEMA]
}

TokensInput = Tokens | list[Tokens]
PromptInput = str | list[str] | TokensInput
PromptOrTokens = str | Tokens

Prompt = Annotated[
    PromptInput,
    PlainValidator(check_prompt),
    WithJsonSchema(PROMPT_SCHEMA),
]
TokenLists = Annotated[
    TokensInput,
    PlainValidator(_check_tokens),
    WithJsonSchema({"anyOf": [_TOKENS_SCHEMA, _TOKEN_LISTS_SCHEMA]}),
]
TokenListsOrEmpty = Annotated[
    TokensInput,
    PlainValidator(lambda value: value if value == [] else _check_tokens(value)),
    WithJsonSchema(
        {"anyOf": [{"type": "array", "maxItems": 0}, _TOKENS_SCHEMA, _TOKEN_LISTS_SCHEMA]}
    ),
]
Whole = Annotated[int, BeforeValidator(_whole)]
TokenId = Annotated[Whole, Field(ge=TOKEN_IDS[0], le=TOKEN_IDS[1])]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
StopStrings = Annotated[
    StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS, fail_fast=True)],
    BeforeValidator(without_empty),
]
Grammar = Annotated[
    str, Field(min_length=1, max_length=MAX_GRAMMAR), AfterValidator(_check_grammar)
]
Seed = Annotated[Whole, bounded("sampling_seed")]
MaxTokens = Annotated[Whole, bounded("max_new_tokens")]
MaxTokensOrZero = Annotated[Whole, Field(ge=0, le=RANGES["max_new_tokens"][1])]
"""0 asks for no token."""

RequestId = Annotated[str, Field(pattern=r"^[!-~]{1,200}$")]
"""Printable, because it is written to the log."""

CacheSalt = Annotated[str, Field(max_length=1024)]

ModelName = Annotated[str, Field(max_length=1024)]
"""Repeated in replies."""

Word = Annotated[str, Field(max_length=256)]
"""A name, or a value of a few, which replies or errors repeat."""

ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
"""OpenAI documents it without the dot, and accepts the dot."""

LogitBias = Annotated[
    dict[
        Annotated[
            str,
            AfterValidator(_check_bias_key),
            WithJsonSchema({"type": "string", "pattern": "^[0-9]{1,10}$"}),
        ],
        Annotated[float, Field(ge=BIASES[0], le=BIASES[1])],
    ],
    Field(max_length=MAX_IDS),
    BeforeValidator(_check_bias_count),
]
