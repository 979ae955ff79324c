"""Text that must follow a grammar, through xgrammar: grammars compiled for one vocabulary, and for
each text what may come next.
"""

from __future__ import annotations

import functools
import json
import os
import re
import threading
import time
from collections.abc import Collection, Iterable, Sequence
from types import ModuleType
from typing import Protocol, cast

import numpy as np
from cachetools import LRUCache
from numpy.typing import NDArray
from tokenizers import Tokenizer

from qtool.engine.detokenizer import special_ids
from qtool.engine.sampling_params import SamplingParams
from qtool.errors import MAX_MESSAGE, ResourceError, UsageError

# characters in a row between the parts of a JSON text: a weak model would go on for ever
MAX_WHITESPACE = 32
CACHE_BYTES = 64 << 20
NICENESS = 10  # of a process that only compiles: what others generate meanwhile goes first
# CPU time that a text may cost, at the start and for each token: all others wait meanwhile
GRACE_S = 0.25
TOKEN_S = 0.005
# how xgrammar's messages begin
_WHERE = re.compile(r"^\[[\d:]+\] \S+: (?:Check failed: \(.*?\) is false: )?")

_loaded: Compiler


class CompiledGrammar(Protocol):
    """What is used of xgrammar's class of that name."""

    memory_size_bytes: int

    def serialize_json(self) -> str:
        """Return the grammar as `Compiler.take` reads it."""


class GrammarMatcher(Protocol):
    """What is used of xgrammar's class of that name."""

    def accept_token(self, token_id: int) -> bool:
        """Add a token; return whether the grammar allows it."""

    def accept_string(self, text: str) -> bool:
        """Add text; return whether the grammar allows it."""

    def fill_next_token_bitmask(self, bitmask: NDArray[np.int32]) -> bool:
        """Write into ``bitmask`` which tokens may come next."""

    def is_completed(self) -> bool:
        """Return whether the text may end here."""

    def rollback(self, num_tokens: int) -> None:
        """Take the last ``num_tokens`` back."""


class _GrammarCompiler(Protocol):
    def compile_json_schema(self, schema: str, *, max_whitespace_cnt: int) -> CompiledGrammar: ...

    def compile_regex(self, regex: str) -> CompiledGrammar: ...

    def compile_grammar(self, grammar: str) -> CompiledGrammar: ...

    def compile_structural_tag(self, structural_tag: str) -> CompiledGrammar: ...


class _TokenizerInfo(Protocol):
    stop_token_ids: Sequence[int]


class Compiler:
    """Compiles grammars for one vocabulary, and caches those used last. Any thread may call it.

    Args:
        tokenizer: the tokenizers library's.
        vocab_size: logits of the model for each token, which may be more than the tokenizer knows.
        eos_ids: the model's end tokens; where there are none, xgrammar knows some by name.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]) -> None:
        self.vocab_size = vocab_size
        self._tokenizer = tokenizer
        self._eos_ids = list(eos_ids)
        self._lock = threading.Lock()
        # a grammar that is larger than the cache has it to itself
        self._kept: LRUCache[tuple[str, str], CompiledGrammar] = LRUCache(
            CACHE_BYTES, getsizeof=lambda grammar: min(grammar.memory_size_bytes, CACHE_BYTES)
        )

    def compile(self, kind: str, text: str) -> CompiledGrammar:
        """Return the compiled grammar of a `SamplingParams.constraint`.

        Takes as long, and as much memory, as the grammar needs; other threads go on meanwhile.
        Raises: UsageError E_GRAMMAR, for what xgrammar does not take; ResourceError E_NO_XGRAMMAR.
        """
        found = self._cached(kind, text)
        return self._cache(kind, text, self._compiled(kind, text)) if found is None else found

    def take(self, kind: str, text: str, compiled: str) -> None:
        """Keep what `compile_to_json` made of a grammar, in another process: `compile` finds it."""
        if self._cached(kind, text) is None:
            grammar = _xgrammar().CompiledGrammar.deserialize_json(compiled, self._vocabulary)
            self._cache(kind, text, grammar)

    def _compiled(self, kind: str, text: str) -> CompiledGrammar:
        compiler = self._compiler
        try:
            match kind:
                case "json_schema":
                    return compiler.compile_json_schema(text, max_whitespace_cnt=MAX_WHITESPACE)
                case "regex":
                    return compiler.compile_regex(text)
                case "ebnf":
                    return compiler.compile_grammar(text)
                case _:
                    return compiler.compile_structural_tag(_bound_whitespace(text))
        except RuntimeError as error:
            reason = _WHERE.sub("", str(error)).partition(" The JSON string is:")[0]
            message = f"{kind}: {' '.join(reason.split())}"[:MAX_MESSAGE]
            raise UsageError(
                "E_GRAMMAR", message, hint="xgrammar's documentation says what a grammar may have"
            ) from error

    def _cached(self, kind: str, text: str) -> CompiledGrammar | None:
        with self._lock:
            return self._kept.get((kind, text))

    def _cache(self, kind: str, text: str, compiled: CompiledGrammar) -> CompiledGrammar:
        with self._lock:
            self._kept[kind, text] = compiled
        return compiled

    @functools.cached_property
    def _vocabulary(self) -> _TokenizerInfo:
        from transformers import PreTrainedTokenizerFast

        tokenizer = PreTrainedTokenizerFast(tokenizer_object=self._tokenizer)
        info = _xgrammar().TokenizerInfo.from_huggingface(
            tokenizer, vocab_size=self.vocab_size, stop_token_ids=self._eos_ids or None
        )
        return cast(_TokenizerInfo, info)

    @functools.cached_property
    def _compiler(self) -> _GrammarCompiler:
        compiler = _xgrammar().GrammarCompiler(self._vocabulary, max_threads=1, cache_enabled=False)
        return cast(_GrammarCompiler, compiler)

    @functools.cached_property
    def all_but_eos(self) -> NDArray[np.int32]:
        """The tokens that are not the model's end tokens, as a mask like a `Constraint`'s."""
        return token_mask(
            {*range(self.vocab_size)}.difference(self._vocabulary.stop_token_ids), self.vocab_size
        )

    @functools.cached_property
    def all_but_special(self) -> NDArray[np.int32]:
        """The tokens that are given out as text, as a mask."""
        return self.all_but_eos & ~token_mask(special_ids(self._tokenizer), self.vocab_size)


class Constraint:
    """What may come next in one text that must follow a grammar; it knows the tokens that were
    read, and nothing of steps.

    An end token may come where the grammar is complete, after min_new_tokens if anything else can
    come. Special tokens are text only for ``structural_tag``, and the model's end tokens never are.

    Args:
        compiler: for the model's vocabulary.
        params: with a ``constraint``.
        end_ids: tokens that end the text.
    Raises: UsageError E_GRAMMAR, also where the grammar allows no token; ResourceError
        E_NO_XGRAMMAR.
    """

    def __init__(
        self, compiler: Compiler, params: SamplingParams, end_ids: Collection[int]
    ) -> None:
        assert params.constraint is not None
        kind, text = params.constraint
        matcher = _xgrammar().GrammarMatcher(compiler.compile(kind, text))
        self._matcher = cast(GrammarMatcher, matcher)
        self._ends = token_mask(end_ids, compiler.vocab_size)
        self._may_be_text = (
            compiler.all_but_eos if kind == "structural_tag" else compiler.all_but_special
        )
        self._least = params.min_new_tokens
        self._tokens = 0
        self._cpu_s = 0.0
        self._filled: NDArray[np.int32] = np.empty((1, len(self._ends)), np.int32)
        self.mask: NDArray[np.int32]
        """int32 [ceil(V / 32)]: token i has bit i % 32 of word i // 32, set if it may come next; a
        new array for each token.
        """
        self._text: NDArray[np.int32]
        if not self._look():
            raise UsageError(
                "E_GRAMMAR",
                f"{kind}: the grammar allows no text but the empty one",
                hint="let it allow at least one character",
            )

    @classmethod
    def of(
        cls, params: SamplingParams, compiler: Compiler | None, end_ids: Collection[int]
    ) -> Constraint | None:
        """Return the constraint of ``params``, None when there is none.

        Raises: UsageError E_SAMPLING, when there is one and no compiler.
        """
        if params.constraint is None:
            return None
        if compiler is None:
            raise UsageError(
                "E_SAMPLING",
                "a grammar needs a tokenizer, and skip_tokenizer_init left it out",
                hint="load the tokenizer",
            )
        return cls(compiler, params, end_ids)

    def accept(self, token: int) -> bool:
        """Add the token that came next, one of ``mask``; return whether it ends the text, because
        it is an end token or nothing can follow it.

        Raises: UsageError E_GRAMMAR, when nothing can follow though the grammar is not complete, or
            the grammar takes too long.
        """
        if not self._text[token >> 5] >> (token & 31) & 1:
            return True
        began = time.thread_time()
        if not self._matcher.accept_token(token):
            raise RuntimeError(
                f"the grammar's mask allowed token {token}, and the grammar does not"
            )
        self._tokens += 1
        goes_on = self._look()
        self._cpu_s += time.thread_time() - began
        if goes_on and self._cpu_s > GRACE_S + self._tokens * TOKEN_S:
            raise UsageError(
                "E_GRAMMAR", "the grammar takes too long to follow", hint="make it less ambiguous"
            )
        return not goes_on

    def begin(self, text: str, tokens: int) -> bool:
        """Begin with ``text``, after ``tokens`` that the grammar does not hold; return whether
        nothing can follow.

        Raises: UsageError E_GRAMMAR, when the grammar does not allow ``text``.
        """
        self._tokens = tokens
        if text and not self._matcher.accept_string(text):
            raise UsageError(
                "E_GRAMMAR",
                "the answer begins in the token that ends the thoughts, not as the grammar asks",
                hint="let the grammar begin with white space",
            )
        return not self._look()

    def masks_along(self, drafts: Sequence[int]) -> list[NDArray[np.int32]]:
        """Return `mask` now and after each of ``drafts``, if they were to come next, up to the
        first that cannot come, ends the text, or takes too long.
        """
        kept = self.mask, self._text, self._tokens
        masks = [self.mask]
        began = time.thread_time()
        try:
            for token in drafts:
                if time.thread_time() - began >= TOKEN_S or not self._step(token):
                    break
                masks.append(self.mask)
        finally:
            self._matcher.rollback(self._tokens - kept[2])
            self.mask, self._text, self._tokens = kept
        return masks

    def _step(self, token: int) -> bool:
        """Add ``token`` if it may come next; return whether it came and more can follow."""
        allowed = self.mask[token >> 5] & self._text[token >> 5]
        if not allowed >> (token & 31) & 1 or not self._matcher.accept_token(token):
            return False
        self._tokens += 1
        try:
            return self._look()
        except UsageError:
            return False

    def _look(self) -> bool:
        """Find what may come next; return whether that is any text."""
        self._matcher.fill_next_token_bitmask(self._filled)
        complete = self._matcher.is_completed()
        self._text = self._filled[0] & self._may_be_text
        if not self._text.any():
            if not complete:
                raise UsageError(
                    "E_GRAMMAR",
                    "no token of the model continues the text as the grammar asks",
                    hint="look for rules that never end",
                )
            return False
        self.mask = self._text
        if self._tokens < self._least:
            without_ends = self._text & ~self._ends
            self.mask = without_ends if without_ends.any() else self._text
        elif complete:
            self.mask = self._text | self._ends
        return True


def _bound_whitespace(tag: str) -> str:
    """Return the structural tag with `MAX_WHITESPACE` for each of its JSON schemas that names no
    other bound.
    """
    try:
        value = json.loads(tag)
    except ValueError:
        return tag  # xgrammar says what is wrong with it
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict) and one.get("type") == "json_schema":
            one.setdefault("max_whitespace_cnt", MAX_WHITESPACE)
        elif isinstance(one, (dict, list)):
            waiting += one.values() if isinstance(one, dict) else one
    return json.dumps(value)


def load(tokenizer: str, vocab_size: int, eos_ids: Sequence[int]) -> None:
    """Make `compile_to_json` ready, in a process that may be ended when it takes too long.

    Args:
        tokenizer: the text of tokenizer.json.
        vocab_size: as `Compiler` takes it.
        eos_ids: as `Compiler` takes them.
    """
    global _loaded
    os.nice(NICENESS)
    _loaded = Compiler(Tokenizer.from_str(tokenizer), vocab_size, eos_ids)
    _loaded.compile("regex", "a")  # imports and makes what all grammars need


def compile_to_json(kind: str, text: str) -> str:
    """Return a compiled grammar as `Compiler.take` reads it. Raises: as `Compiler.compile`."""
    return _loaded.compile(kind, text).serialize_json()


def token_mask(ids: Iterable[int], vocab_size: int) -> NDArray[np.int32]:
    """Return a mask like `Constraint.mask` in which ``ids`` are set."""
    flags = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    flags[[token_id for token_id in ids if 0 <= token_id < vocab_size]] = 1
    return np.packbits(flags, bitorder="little").view(np.int32)


def _xgrammar() -> ModuleType:
    try:
        import xgrammar
    except ImportError as error:
        raise ResourceError(
            "E_NO_XGRAMMAR",
            "constrained output needs the package `xgrammar`",
            hint="pip install 'qtool[grammar]'",
        ) from error
    return cast(ModuleType, xgrammar)
