"""`SamplingParams`: the sampling options of a request, checked when they are made; without torch,
so that the server can check them too.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import cast

from qtool.errors import UsageError, nearest

GREEDY_BELOW = 1e-6  # temperatures below this are 0
MAX_TOP_LOGPROBS = 20
MAX_STOP_STRINGS, MAX_STOP_LENGTH, MAX_IDS = 64, 1024, 1024
MAX_GRAMMAR = 64 * 1024  # bytes
LARGEST = 2**31 - 1
CONSTRAINTS = ("json_schema", "regex", "ebnf", "structural_tag")
# of these, the ones that are JSON may also be given as dictionaries
MAPPINGS = ("json_schema", "structural_tag")
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
OPTIONAL = {"max_new_tokens", "sampling_seed"}  # of RANGES, those that may be None
WHOLE = {"max_new_tokens", "min_new_tokens", "n", "sampling_seed", "top_k"}
NOT_OFFERED = {  # of SGLang's
    "stop_regex": "`stop` takes strings",
    "custom_params": "they are for logit processors, which the engine does not run",
    "beam_width": "tokens are sampled, or greedy with temperature 0",
    "stream_interval": "each token is streamed when it comes",
}
_FLAGS = ("ignore_eos", "skip_special_tokens", "spaces_between_special_tokens", "no_stop_trim")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are sampled and when the text ends, under SGLang's names.

    A text that must follow a grammar (`json_schema`, `regex`, `ebnf` or `structural_tag`, as
    xgrammar takes it) ends with reason stop as soon as nothing can follow, whatever `ignore_eos`
    and `min_new_tokens` say.
    Raises: UsageError E_SAMPLING.
    """

    max_new_tokens: int | None = 128
    """None: to the end of the context."""
    temperature: float = 1.0
    """0: greedy."""
    top_p: float = 1.0
    top_k: int = -1
    """-1: all tokens."""
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int | str, float] | None = None
    """What is added to the logits, by token id."""
    sampling_seed: int | None = None
    n: int = 1
    """Completions of each prompt."""
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    """They end the text even with ignore_eos."""
    ignore_eos: bool = False
    min_new_tokens: int = 0
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    """Accepted without effect."""
    no_stop_trim: bool = False
    """Keep the stop string or token in the text."""
    json_schema: str | Mapping[str, object] | None = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: str | Mapping[str, object] | None = None
    reasoning_start: str | None = None
    """The marker that may begin thoughts; None: the text begins inside of them."""
    reasoning_end: str | Sequence[str] | None = None
    """The marker that ends thoughts (of several, each follows the one before): stop strings and the
    grammar hold what follows it. None: there are no thoughts.
    """
    reasoning_calls: Sequence[str] = ()
    """Markers of tool calls before the end of thoughts; what follows is not counted as thoughts."""
    kept_special_tokens: Sequence[str] = ()
    """Special tokens that stay in the text, like those of the two markers, though
    `skip_special_tokens` leaves others out.
    """

    def __post_init__(self) -> None:
        for name in RANGES:
            value = getattr(self, name)
            if value is not None or name not in OPTIONAL:
                object.__setattr__(self, name, _checked_number(name, value))
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise _refusal(name, getattr(self, name), "true or false")
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        object.__setattr__(self, "stop", _strings("stop", self.stop))
        object.__setattr__(self, "stop_token_ids", _ids(self.stop_token_ids))
        for name in CONSTRAINTS:
            object.__setattr__(self, name, _grammar(name, getattr(self, name)))
        object.__setattr__(self, "reasoning_end", _strings("reasoning_end", self.reasoning_end))
        calls = _strings("reasoning_calls", self.reasoning_calls)
        object.__setattr__(self, "reasoning_calls", calls)
        kept = _strings("kept_special_tokens", self.kept_special_tokens)
        object.__setattr__(self, "kept_special_tokens", kept)
        self._check_combinations()

    def _check_combinations(self) -> None:
        """Check what no field shows by itself."""
        if self.reasoning_start is not None:
            _strings("reasoning_start", [self.reasoning_start])
            if not self.reasoning_end:
                raise _refusal("reasoning_start", self.reasoning_start, "text with a reasoning_end")
        if self.top_k == 0:
            raise _refusal("top_k", 0, "-1 for all tokens, or at least 1")
        most = self.max_new_tokens
        if most is not None and self.min_new_tokens > most:
            raise _refusal("min_new_tokens", self.min_new_tokens, f"at most max_new_tokens, {most}")
        given = [name for name in CONSTRAINTS if getattr(self, name) is not None]
        if len(given) > 1:
            raise UsageError(
                "E_SAMPLING",
                f"{' and '.join(given)} cannot constrain the same text",
                hint="give one of them",
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> SamplingParams:
        """Return the parameters that ``values`` name; ``seed`` is another name of
        ``sampling_seed``.

        Raises: UsageError E_SAMPLING, for an unknown name with a value that asks for something, a
            wrong type or a value out of range.
        """
        if not isinstance(values, Mapping):
            raise UsageError(
                "E_SAMPLING",
                "sampling_params is not a dictionary",
                hint="give names and values, such as temperature: 0.8",
            )
        given = {
            name: value for name, value in values.items() if value is not None or name in OPTIONAL
        }
        known = [field.name for field in fields(cls)]
        for name in list(given):
            is_known = name in (*known, "seed")
            if not is_known and given.pop(name) not in (False, "", [], {}):
                raise _unknown(str(name)[:100], known)
        seed = given.pop("seed", None)
        if seed is not None and given.setdefault("sampling_seed", seed) not in (seed, None):
            raise UsageError(
                "E_SAMPLING",
                "seed and sampling_seed differ",
                hint="they are one parameter: give one of them",
            )
        if seed is not None:
            given["sampling_seed"] = seed
        return cls(**given)  # type: ignore[arg-type]  # checked by __post_init__

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise: UsageError, for token ids that the model does not have."""
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
        """The stop strings, without empty ones, which ask for nothing."""
        return cast(tuple[str, ...], self.stop)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The token ids that end the text besides the model's own."""
        return cast(tuple[int, ...], self.stop_token_ids)

    @property
    def reasoning_ends(self) -> tuple[str, ...]:
        """The markers that end thoughts, one after the other."""
        return cast(tuple[str, ...], self.reasoning_end)

    @property
    def markers(self) -> tuple[str, ...]:
        """What stays in the text though it may be special tokens."""
        start = () if self.reasoning_start is None else (self.reasoning_start,)
        return (*cast(tuple[str, ...], self.kept_special_tokens), *start, *self.reasoning_ends)

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
        """Return a seed for the ``index``-th of the n completions: derived from the request's, or a
        random one.
        """
        if self.sampling_seed is None:
            return secrets.randbits(64)
        # the first of n is the same as a single one
        return (self.sampling_seed + index * 0x9E3779B97F4A7C15) % 2**64


def _unknown(name: str, known: Sequence[str]) -> UsageError:
    if name in NOT_OFFERED:
        message = f"the sampling parameter `{name}` is not offered"
        return UsageError("E_SAMPLING", message, hint=NOT_OFFERED[name])
    hint = nearest(name, known) or f"known are {', '.join(known)}"
    return UsageError("E_SAMPLING", f"unknown sampling parameter `{name}`", hint=hint)


def _refusal(name: str, value: object, allowed: str) -> UsageError:
    return UsageError(
        "E_SAMPLING", f"`{name}` cannot be {repr(value)[:60]}", hint=f"`{name}` takes {allowed}"
    )


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_token_id(value: object) -> bool:
    """Whether ``value`` is a token id of some vocabulary."""
    return _is_whole(value) and TOKEN_IDS[0] <= cast(int, value) <= TOKEN_IDS[1]


def _checked_number(name: str, value: object) -> int | float:
    is_whole = name in WHOLE
    if is_whole and isinstance(value, float) and value.is_integer():
        value = int(value)
    if (_is_whole(value) or (isinstance(value, float) and not is_whole)) and _is_in_range(
        name, cast(float, value)
    ):
        return cast(int, value) if is_whole else float(cast(float, value))
    low, high = RANGES[name]
    noun = "a whole number" if is_whole else "a number"
    start = "above" if name in ABOVE_ZERO else "from"
    raise _refusal(name, value, f"{noun} {start} {low} to {high}")


def _is_in_range(name: str, number: float) -> bool:
    low, high = RANGES[name]
    if number == 0 and name in ABOVE_ZERO:
        return False
    return low <= number <= high  # NaN is in no range


def _biases(value: object) -> dict[int, float]:
    if value is None:
        return {}
    low, high = BIASES
    allowed = f"at most {MAX_IDS} token ids, each with a number from {low} to {high}"
    if not isinstance(value, Mapping) or len(value) > MAX_IDS:
        raise _refusal("logit_bias", value, allowed)
    biases: dict[int, float] = {}
    for key, bias in value.items():
        token_id = _key_token_id(key)
        if not is_token_id(token_id) or not _is_bias(bias):
            raise _refusal("logit_bias", {key: bias}, allowed)
        biases[cast(int, token_id)] = float(bias)
    return biases


def _key_token_id(key: object) -> object:
    """Return a key of logit_bias as a number, where JSON made a string of it."""
    is_number = isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 11
    return int(cast(str, key)) if is_number else key


def _is_bias(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return BIASES[0] <= value <= BIASES[1]


def _strings(name: str, value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    allowed = (
        f"a string or at most {MAX_STOP_STRINGS} of them, each of at most {MAX_STOP_LENGTH} "
        "characters of valid Unicode"
    )
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, list | tuple) or len(strings) > MAX_STOP_STRINGS:
        raise _refusal(name, value, allowed)
    for string in strings:
        if not isinstance(string, str) or len(string) > MAX_STOP_LENGTH:
            raise _refusal(name, string, allowed)
        if _utf8_size(string) is None:
            raise _refusal(name, string, f"{allowed}: this one has half of a surrogate pair")
    return tuple(filter(None, strings))


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
    text = value
    if name in MAPPINGS:
        allowed += ", or a dictionary that stands for it"
        text = _dumped(name, value, allowed) if isinstance(value, Mapping) else value
    if not isinstance(text, str) or not is_grammar(text):
        raise _refusal(name, value, allowed)
    return text


def _dumped(name: str, value: Mapping[object, object], allowed: str) -> str:
    try:
        return json.dumps(dict(value), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise _refusal(name, value, f"{allowed}, and this one is not JSON") from error


def is_grammar(text: str) -> bool:
    """Whether ``text`` has a size that a grammar may have, and is valid Unicode."""
    if not 1 <= len(text) <= MAX_GRAMMAR:
        return False
    size = _utf8_size(text)
    return size is not None and size <= MAX_GRAMMAR


def _utf8_size(text: str) -> int | None:
    """Return the bytes of ``text``; None where it has half of a surrogate pair."""
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        return None
