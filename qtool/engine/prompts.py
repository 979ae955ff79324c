"""Prompts as callers give them, text or tokens, one or several, as lists of tokens."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from tokenizers import Tokenizer

from qtool.errors import UsageError

PROMPT_HINT = "give text, or a list of texts, or tokens as input_ids"


class PromptTokenizer(Protocol):
    """What is used of a fast tokenizer of transformers."""

    name_or_path: str
    backend_tokenizer: Tokenizer
    eos_token_id: int | None
    chat_template: str | Mapping[str, str] | None

    def __call__(self, text: str, *, verbose: bool) -> Mapping[str, list[int]]:
        """Return ``input_ids`` and more."""

    def apply_chat_template(
        self,
        conversations: Sequence[Sequence[Mapping[str, object]]],
        *,
        tokenize: Literal[False],
        add_generation_prompt: bool,
        **variables: object,
    ) -> list[str]:
        """Return one prompt for each of ``conversations``, which are lists of messages."""


@dataclass(frozen=True)
class PromptReader:
    """Turns prompts into tokens."""

    tokenizer: PromptTokenizer | None
    vocab_size: int

    def read(
        self,
        prompt: str | Sequence[str] | None,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None,
    ) -> tuple[list[list[int]], bool]:
        """Return the prompts as tokens, and whether there is one that is not in a list.

        Raises: UsageError.
        """
        if (prompt is None) == (input_ids is None):
            raise UsageError(
                "E_PROMPT", "give either prompt or input_ids", hint="one of them, and not both"
            )
        if prompt is not None:
            texts, single = _as_list(prompt, str)
            return [self._encode(text) for text in texts], single
        prompts, single = _as_list(input_ids, int)
        return [self.check_token_ids(tokens) for tokens in prompts], single

    def _encode(self, text: object) -> list[int]:
        if self.tokenizer is None:
            raise UsageError(
                "E_PROMPT",
                "a text prompt needs a tokenizer, and skip_tokenizer_init left it out",
                hint="give input_ids",
            )
        if not isinstance(text, str):
            raise UsageError(
                "E_PROMPT", f"a prompt is a {type(text).__name__}, not text", hint=PROMPT_HINT
            )
        try:
            return self.check_token_ids(self.tokenizer(text, verbose=False)["input_ids"])
        except (TypeError, UnicodeError) as error:
            raise not_unicode() from error

    def check_token_ids(self, prompt: object) -> list[int]:
        """Return ``prompt`` as a list.

        Raises: UsageError, when it has something that is not a token of the model.
        """
        size = self.vocab_size
        if isinstance(prompt, (list, tuple)) and all(
            type(token) is int and 0 <= token < size for token in prompt
        ):
            return list(prompt)
        message = "a prompt or a label has something that is not a token of the model"
        raise UsageError("E_PROMPT", message, hint=f"tokens are whole numbers from 0 to {size - 1}")


def not_unicode() -> UsageError:
    """Return the error for a text with half of a surrogate pair."""
    return UsageError(
        "E_PROMPT", "a prompt is not valid Unicode", hint="it has half of a surrogate pair"
    )


def _as_list(given: object, kind: type) -> tuple[Sequence[object], bool]:
    """Return the prompts in ``given``, and whether it is a single prompt: text, or a list of tokens
    where ``kind`` is int.
    """
    if hasattr(given, "tolist"):  # an array of NumPy or torch
        given = given.tolist()
    if isinstance(given, str):
        return [given], True
    if not isinstance(given, (list, tuple)):
        raise UsageError("E_PROMPT", f"a prompt is a {type(given).__name__}", hint=PROMPT_HINT)
    if not given:
        raise UsageError("E_PROMPT", "there is no prompt", hint="give one, or a list of them")
    single = kind is int and isinstance(given[0], int)
    return ([given] if single else given), single


def names_of(rid: str | Sequence[str] | None, count: int) -> list[str]:
    """Return a name for each of ``count`` prompts, where ``rid`` gives them, those."""
    if isinstance(rid, (list, tuple)):
        return [str(name) for name in rid]
    if rid is not None and count > 1:
        message = f"one rid for {count} prompts"
        raise UsageError("E_REQUEST_ID", message, hint="give a list of them")
    return [str(rid or uuid.uuid4().hex) for _ in range(count)]
