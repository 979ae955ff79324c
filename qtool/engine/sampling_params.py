"""What a request may ask for, checked once, when it is made; without torch, so that whoever only
takes requests can check them too.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

from qtool.errors import UsageError, nearest

GREEDY_BELOW = 1e-6  # temperatures below this are 0
MAX_TOP_LOGPROBS = 20
MAX_STOP_STRINGS, MAX_STOP_LENGTH, MAX_IDS = 64, 1024, 1024
MAX_GRAMMAR = 64 * 1024  # bytes
LARGEST = 2**31 - 1
CONSTRAINTS = ("json_schema", "regex", "ebnf", "structural_tag")
# those that are JSON may also be given as dictionaries
MAPPINGS = (
    "json_schema",
    "structural_tag",
)
ANY_JSON_OBJECT = "$$ANY$$"  # a json_schema, as SGLang spells it

RANGES: dict[str, tuple[float, float]] = {  # of every number, for the Engine and over HTTP
    "max_new_tokens": (1, LARGEST),
    "min_new_tokens": (0, LARGEST),
    "n": (1, 128),
    "sampling_seed": (-(2**63), 2**64 - 1),
    "top_k": (-1, LARGEST),
    "temperature": (0, 100),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "frequency_penalty": (-2, 2),
    "presence_penalty": (-2, 2),
    "repetition_penalty": (0.001, 2),
}
TOKEN_IDS = (0, LARGEST)  # of stop_token_ids and logit_bias
BIASES = (-100, 100)
ABOVE_ZERO = {"top_p"}
WHOLE = {"max_new_tokens", "min_new_tokens", "n", "sampling_seed", "top_k"}
_FLAGS = ("ignore_eos", "skip_special_tokens", "spaces_between_special_tokens", "no_stop_trim")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """What one request asks of the sampler and of the text, under SGLang's names; checked when it
    is made.

    max_new_tokens: None is to the end of the context. temperature: 0 is greedy. top_k: -1 is all.
        stop_token_ids end the text even with ignore_eos.
    json_schema, regex, ebnf, structural_tag: what the text must be, at most one of them, as
    xgrammar takes it; such a text ends, with reason stop, as soon as nothing can follow, whatever
    ignore_eos and min_new_tokens say.
    """

    max_new_tokens: int | None = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int | str, float] | None = None
    sampling_seed: int | None = None
    n: int = 1
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    min_new_tokens: int = 0
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    no_stop_trim: bool = False
    json_schema: str | Mapping[str, Any] | None = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: str | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in RANGES:
            value = getattr(self, name)
            if value is not None or name not in ("max_new_tokens", "sampling_seed"):
                object.__setattr__(self, name, _checked(name, value))
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise _refusal(name, getattr(self, name), "true or false")
        if self.top_k == 0:
            raise _refusal("top_k", 0, "-1 for all tokens, or at least 1")
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise _refusal(
                "min_new_tokens",
                self.min_new_tokens,
                f"at most max_new_tokens, {self.max_new_tokens}",
            )
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        object.__setattr__(self, "stop", _stops(self.stop))
        object.__setattr__(self, "stop_token_ids", _ids(self.stop_token_ids))
        for name in CONSTRAINTS:
            object.__setattr__(self, name, _grammar(name, getattr(self, name)))
        given = [name for name in CONSTRAINTS if getattr(self, name) is not None]
        if len(given) > 1:
            raise UsageError(
                "E_SAMPLING",
                f"the text cannot be held to {' and '.join(given)}",
                hint="give one of them",
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SamplingParams:
        """Return the parameters that ``values`` name; ``seed`` is another name of
        ``sampling_seed``.

        Raises: UsageError E_SAMPLING, for a name that is none, a wrong type or a value out of
            range.
        """
        if not isinstance(values, Mapping):
            raise UsageError(
                "E_SAMPLING",
                "sampling_params is no dictionary",
                hint="give names and values, such as temperature: 0.8",
            )
        given = dict(values)
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in (*known, "seed"):
                hint = nearest(str(name)[:100], known) or f"known are {', '.join(known)}"
                raise UsageError(
                    "E_SAMPLING", f"there is no sampling parameter `{str(name)[:100]}`", hint=hint
                )
        seed = given.pop("seed", None)
        if seed is not None and given.setdefault("sampling_seed", seed) not in (seed, None):
            raise UsageError(
                "E_SAMPLING",
                "seed and sampling_seed differ",
                hint="they are one parameter: give one of them",
            )
        if seed is not None:
            given["sampling_seed"] = seed
        return cls(**given)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse token ids the model does not have."""
        for name, ids in (("logit_bias", self.biases), ("stop_token_ids", self.stop_ids)):
            for token_id in ids:
                if token_id >= vocab_size:
                    raise _refusal(name, token_id, f"token ids from 0 to {vocab_size - 1}")

    @property
    def greedy(self) -> bool:
        """Whether the largest logit is taken."""
        return self.temperature < GREEDY_BELOW or self.top_k == 1

    @property
    def penalizes(self) -> bool:
        """Whether the logits depend on how often tokens came before."""
        return (
            self.repetition_penalty != 1
            or self.frequency_penalty != 0
            or self.presence_penalty != 0
        )

    @property
    def waits_for_tokens(self) -> bool:
        """Whether each token must be known before the next is drawn."""
        return self.penalizes or self.constraint is not None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings; none is empty."""
        return cast(tuple[str, ...], self.stop)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The token ids that end the text besides the model's own."""
        return cast(tuple[int, ...], self.stop_token_ids)

    @property
    def biases(self) -> dict[int, float]:
        """What is added to the logits, by token id."""
        return cast(dict[int, float], self.logit_bias)

    @property
    def constraint(self) -> tuple[str, str] | None:
        """The grammar that the text must follow: its kind, one of CONSTRAINTS, and its text."""
        if self.json_schema == ANY_JSON_OBJECT:
            return "json_schema", '{"type": "object"}'
        return next(
            ((name, text) for name in CONSTRAINTS if (text := getattr(self, name)) is not None),
            None,
        )

    def row_seed(self, index: int = 0) -> int:
        """Return a seed for the ``index``-th of the n texts: made from the request's, or a random
        one.
        """
        if self.sampling_seed is None:
            return secrets.randbits(64)
        return (
            self.sampling_seed + index * 0x9E3779B97F4A7C15
        ) % 2**64  # the first of n is the one alone


def _refusal(name: str, value: object, allowed: str) -> UsageError:
    return UsageError(
        "E_SAMPLING", f"`{name}` cannot be {repr(value)[:60]}", hint=f"`{name}` takes {allowed}"
    )


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_token_id(value: object) -> bool:
    """Whether ``value`` is a token id of some vocabulary."""
    return _is_whole(value) and TOKEN_IDS[0] <= cast(int, value) <= TOKEN_IDS[1]


def _checked(name: str, value: object) -> int | float:
    low, high = RANGES[name]
    allowed = (
        f"{'a whole number' if name in WHOLE else 'a number'} "
        f"{'above' if name in ABOVE_ZERO else 'from'} {low} to {high}"
    )
    if not (_is_whole(value) or (isinstance(value, float) and name not in WHOLE)):
        raise _refusal(name, value, allowed)
    number = cast(float, value)
    if not low <= number <= high or (number == 0 and name in ABOVE_ZERO):  # NaN is in no range
        raise _refusal(name, value, allowed)
    return number if name in WHOLE else float(number)


def _biases(value: object) -> dict[int, float]:
    low, high = BIASES
    allowed = f"at most {MAX_IDS} token ids, each with a number from {low} to {high}"
    if value is None:
        return {}
    if not isinstance(value, Mapping) or len(value) > MAX_IDS:
        raise _refusal("logit_bias", value, allowed)
    biases = {}
    for key, bias in value.items():
        number = (
            int(key)
            if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 11
            else key
        )
        if not is_token_id(number):
            raise _refusal("logit_bias", {key: bias}, allowed)
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not low <= bias <= high:
            raise _refusal("logit_bias", {key: bias}, allowed)
        biases[number] = float(bias)
    return biases


def _stops(value: object) -> tuple[str, ...]:
    allowed = (
        f"a string or at most {MAX_STOP_STRINGS} of them, each of 1 to {MAX_STOP_LENGTH} characters"
    )
    if value is None:
        return ()
    stops = (value,) if isinstance(value, str) else value
    if not isinstance(stops, list | tuple) or len(stops) > MAX_STOP_STRINGS:
        raise _refusal("stop", value, allowed)
    for stop in stops:
        if not isinstance(stop, str) or not 1 <= len(stop) <= MAX_STOP_LENGTH:
            raise _refusal("stop", stop, allowed)
    return tuple(stops)


def _ids(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    allowed = f"a list of at most {MAX_IDS} token ids"
    if not isinstance(value, list | tuple) or len(value) > MAX_IDS:
        raise _refusal("stop_token_ids", value, allowed)
    for token_id in value:
        if not is_token_id(token_id):
            raise _refusal("stop_token_ids", token_id, allowed)
    return tuple(value)


def _grammar(name: str, value: object) -> str | None:
    if value is None:
        return None
    allowed = f"text of 1 to {MAX_GRAMMAR} bytes"
    if name in MAPPINGS:
        allowed += ", or a dictionary that stands for it"
    text = value
    if name in MAPPINGS and isinstance(value, Mapping):
        try:
            text = json.dumps(dict(value), ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise _refusal(name, value, f"{allowed}, and this one is no JSON") from error
    if not isinstance(text, str) or not is_grammar(text):
        raise _refusal(name, value, allowed)
    return text


def is_grammar(text: str) -> bool:
    """Whether ``text`` has a size that a grammar may have, and is valid Unicode."""
    if not 1 <= len(text) <= MAX_GRAMMAR:
        return False
    try:
        return len(text.encode()) <= MAX_GRAMMAR
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
