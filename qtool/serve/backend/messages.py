"""The messages between the server and the engine's process, and how they are encoded.

A message is a length (4 bytes, big-endian) and msgpack. Both ends are ours, and neither passes on
bytes of a client unread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from struct import Struct as Format
from typing import Self

import msgspec
from msgspec import Struct

from qtool.checkpoint.encoding import Encoding
from qtool.engine.outputs import CompletionOutput, SpecCounts
from qtool.engine.sampling_params import SamplingParams
from qtool.errors import QtoolError, to_wire

LENGTH = Format("!I")
EngineOptions = dict[str, str | int | float | bool | None]
WireError = dict[str, str | int]  # a `QtoolError`, as `wire_error` returns it


@dataclass(frozen=True)
class Submission:
    """Prompts to be completed, ``params.n`` times each."""

    prompts: Sequence[Sequence[int]]
    params: SamplingParams
    stream: bool
    rid: str
    top_logprobs: int | None = None
    """None: no log probabilities."""
    prompt_logprobs_from: int = -1
    """-1: none of the prompt."""
    label_token_ids: Sequence[int] = field(default_factory=list)
    """With log probabilities: tokens whose own are returned for each generated token."""
    cache_salt: str = ""
    """Only prompts with the same one share their prefixes."""
    grammar: tuple[str, str, str] | None = None
    """(kind, text, compiled) of the constraint in ``params``."""

    @property
    def completions(self) -> int:
        """How many completions are requested."""
        return len(self.prompts) * self.params.n

    def max_logprobs(self, context_length: int) -> int:
        """Return how many log probabilities there may be."""
        if self.top_logprobs is None:
            return 0
        tokens = 0
        for prompt in self.prompts:
            new_tokens = self.params.max_new_tokens
            tokens += context_length - len(prompt) if new_tokens is None else new_tokens
            if self.prompt_logprobs_from >= 0:
                tokens += max(len(prompt) - self.prompt_logprobs_from, 0)
        return tokens * self._logprobs_each

    def within_logprobs(self, most: int, context_length: int) -> Self:
        """Return this, or where nobody set a limit of new tokens one with a limit that ``most`` log
        probabilities allow: a request that names no length is not refused for it.
        """
        if self.top_logprobs is None or self.params.max_new_tokens is not None:
            return self
        limit = most // (len(self.prompts) * self._logprobs_each)
        if limit >= context_length:
            return self
        return replace(self, params=replace(self.params, max_new_tokens=limit))

    @property
    def _logprobs_each(self) -> int:
        """How many log probabilities a place of a prompt has, in all its completions."""
        return self.params.n * (1 + (self.top_logprobs or 0) + len(self.label_token_ids))


@dataclass(frozen=True)
class EngineInfo:
    """What the engine reports once it is loaded."""

    model_path: str
    tokenizer_path: str
    tokenizer: str
    """tokenizer.json, as the tokenizers library writes it."""
    eos_ids: tuple[int, ...]
    vocab_size: int
    context_length: int
    max_running: int
    max_total_tokens: int
    page_size: int
    """Tokens of a page of the KV cache: prefixes are found in whole pages."""
    device: str
    dtype: str
    quantization: str
    """The schemes of the layers; empty for a model that is not quantized."""
    kv_cache_dtype: str
    weights_bytes: int
    start_seconds: dict[str, float]
    """How long each part of the start took, by the name of the part."""
    encoding: Encoding | None = None
    """What the model returns for a prompt; None: it continues it."""


@dataclass(frozen=True)
class EngineStats:
    """What the engine is doing at one moment."""

    running: int
    waiting: int
    kv_usage: float
    """Share of the KV cache in use."""
    prefix_queries: int
    prefix_hits: int
    preemptions: int
    steps: int
    """Steps since the start."""
    used_tokens: int = 0
    """Tokens whose room in the KV cache is taken."""
    tokens_per_s: float = 0.0
    """Tokens generated a second, at present."""
    spec: SpecCounts | None = None
    """What came of drafts since the start; None where there are none."""


class Start(Struct, tag=True):
    """To the engine, first: load a model."""

    model_path: str
    options: EngineOptions
    """Fields of `EngineConfig`."""
    log_level: str


class Submit(Struct, tag=True):
    """To the engine: compute ``submission``."""

    key: int
    submission: Submission


class Cancel(Struct, tag=True):
    """To the engine: end a submission whose outputs nobody reads any more."""

    key: int


class Abort(Struct, tag=True):
    """To the engine: end the submissions named ``rid``, or all of them; each completion ends with
    what it has.
    """

    rid: str | None


class FlushCache(Struct, tag=True):
    """To the engine: let no submission after this one find pages of those before it."""


class GetStats(Struct, tag=True):
    """To the engine: answer with `Stats`."""

    key: int


class Ready(Struct, tag=True):
    """From the engine, first: the model is loaded."""

    info: EngineInfo


class Failed(Struct, tag=True):
    """From the engine, first: the model is not loaded."""

    error: WireError


class KeyedOutput(Struct, array_like=True, gc=False):
    """An output of the submission ``key``, or the error that ended it."""

    key: int
    output: CompletionOutput | WireError


class Outputs(Struct, tag=True):
    """From the engine: what its submissions gained, in order."""

    outputs: list[KeyedOutput]


class Stats(Struct, tag=True):
    """From the engine: the answer to `GetStats`."""

    key: int
    stats: EngineStats


ToEngine = Start | Submit | Cancel | Abort | FlushCache | GetStats
FromEngine = Ready | Failed | Outputs | Stats

_encode = msgspec.msgpack.Encoder().encode
_to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_from_engine: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


def encode(message: ToEngine | FromEngine) -> bytes:
    """Return ``message`` with its length in front."""
    data = _encode(message)
    return LENGTH.pack(len(data)) + data


def decode_to_engine(data: bytes) -> ToEngine:
    """Return a message of the server."""
    return _to_engine.decode(data)


def decode_from_engine(data: bytes) -> FromEngine:
    """Return a message of the engine."""
    return _from_engine.decode(data)


def wire_error(error: QtoolError) -> WireError:
    """Return ``error`` as it is sent, for `qtool.errors.from_wire`; halves of surrogate pairs are
    escaped.
    """
    return {name: _escaped(value) for name, value in to_wire(error).items()}


def _escaped(value: object) -> str | int:
    if isinstance(value, int):
        return value
    return str(value).encode("utf-8", "backslashreplace").decode()
