"""Text held to a grammar, through xgrammar: grammars compiled for one vocabulary, and for each text
what may come next.
"""

from __future__ import annotations

import functools
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from qtool.engine.detokenizer import special_ids
from qtool.engine.sampling_params import SamplingParams
from qtool.errors import MAX_MESSAGE, ResourceError, UsageError

MOST_WHITESPACE = (
    32  # characters in a row between the parts of a JSON text: a weak model would go on for ever
)
CACHE_BYTES = 128 << 20
# seconds of a CPU that a text may cost, and each of its tokens beside: all others wait meanwhile
GRACE_S, TOKEN_S = (
    0.25,
    0.005,
)
# how xgrammar's messages begin
_WHERE = re.compile(r"^\[[\d:]+\] \S+: (?:Check failed: \(.*?\) is false: )?")

_loaded: Compiler


class Compiler:
    """Compiles grammars for one vocabulary, and keeps those used last. Any thread may call it.

    Args:
        tokenizer: the tokenizers library's.
        vocab_size: logits of the model for each token, which may be more than the tokenizer knows.
        eos_ids: the model's end tokens; where there are none, xgrammar knows some by name.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]) -> None:
        self.vocab_size = vocab_size
        self._tokenizer, self._eos_ids = tokenizer, list(eos_ids)
        self._lock = threading.Lock()
        # the one used last at the end
        self._kept: OrderedDict[tuple[str, str], Any] = OrderedDict()

    def compile(self, kind: str, text: str) -> Any:
        """Return xgrammar's ``CompiledGrammar`` of a `SamplingParams.constraint`.

        Takes as long, and as much memory, as the grammar wants; other threads go on meanwhile.
        Raises: UsageError E_GRAMMAR, for what xgrammar does not take; ResourceError E_NO_XGRAMMAR.
        """
        found = self._found(kind, text)
        return self._keep(kind, text, self._compiled(kind, text)) if found is None else found

    def take(self, kind: str, text: str, compiled: str) -> None:
        """Keep what `compile_to_json` made of a grammar, in another process: `compile` finds it."""
        if self._found(kind, text) is None:
            self._keep(
                kind, text, _xgrammar().CompiledGrammar.deserialize_json(compiled, self._vocabulary)
            )

    def _compiled(self, kind: str, text: str) -> Any:
        compiler = self._compiler
        try:
            match kind:
                case "json_schema":
                    return compiler.compile_json_schema(text, max_whitespace_cnt=MOST_WHITESPACE)
                case "regex":
                    return compiler.compile_regex(text)
                case "ebnf":
                    return compiler.compile_grammar(text)
                case _:
                    return compiler.compile_structural_tag(text)
        except RuntimeError as error:
            said = _WHERE.sub("", str(error)).partition(" The JSON string is:")[0]
            message = f"{kind}: {' '.join(said.split())}"[:MAX_MESSAGE]
            raise UsageError(
                "E_GRAMMAR", message, hint="xgrammar's documentation says what a grammar may have"
            ) from error

    def _found(self, kind: str, text: str) -> Any:
        with self._lock:
            if (kind, text) in self._kept:
                self._kept.move_to_end((kind, text))
            return self._kept.get((kind, text))

    def _keep(self, kind: str, text: str, compiled: Any) -> Any:
        with self._lock:
            self._kept[kind, text] = compiled
            while (
                len(self._kept) > 1
                and sum(one.memory_size_bytes for one in self._kept.values()) > CACHE_BYTES
            ):
                self._kept.popitem(last=False)
        return compiled

    @functools.cached_property
    def _vocabulary(self) -> Any:
        from transformers import PreTrainedTokenizerFast

        tokenizer = PreTrainedTokenizerFast(tokenizer_object=self._tokenizer)
        return _xgrammar().TokenizerInfo.from_huggingface(
            tokenizer, vocab_size=self.vocab_size, stop_token_ids=self._eos_ids or None
        )

    @functools.cached_property
    def _compiler(self) -> Any:
        return _xgrammar().GrammarCompiler(self._vocabulary, max_threads=1, cache_enabled=False)

    @functools.cached_property
    def all_but_eos(self) -> NDArray[np.int32]:
        """The tokens that are not the model's end tokens, as a mask like a `Constraint`'s."""
        return _mask(
            {*range(self.vocab_size)}.difference(self._vocabulary.stop_token_ids), self.vocab_size
        )

    @functools.cached_property
    def all_but_special(self) -> NDArray[np.int32]:
        """The tokens that are given out as text, as a mask."""
        return self.all_but_eos & ~_mask(special_ids(self._tokenizer), self.vocab_size)


class Constraint:
    """What may come next in one text that is held to a grammar; it knows the tokens that were read,
    and nothing of steps.

    An end token may come where the grammar is complete, after min_new_tokens if anything else can
    come. Special tokens are no text, but for ``structural_tag``, and the model's end tokens never
    are.

    ``mask``: int32 [ceil(V / 32)], token i has bit i % 32 of word i // 32, set if it may come next;
        a new array for each token.

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
        self._matcher = _xgrammar().GrammarMatcher(compiler.compile(kind, text))
        self._ends = _mask(end_ids, compiler.vocab_size)
        self._may_be_text = (
            compiler.all_but_eos if kind == "structural_tag" else compiler.all_but_special
        )
        self._least = params.min_new_tokens
        self._tokens = 0
        self._cpu_s = 0.0
        self._filled: NDArray[np.int32] = np.empty((1, len(self._ends)), np.int32)
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


def load(tokenizer: str, vocab_size: int, eos_ids: Sequence[int]) -> None:
    """Make `compile_to_json` ready, in a process that may be ended when it takes too long;
    ``tokenizer``: the text of tokenizer.json.
    """
    global _loaded
    _loaded = Compiler(Tokenizer.from_str(tokenizer), vocab_size, eos_ids)
    _loaded.compile("regex", "a")  # imports and makes what all grammars need


def compile_to_json(kind: str, text: str) -> str:
    """Return a compiled grammar as `Compiler.take` reads it. Raises: as `Compiler.compile`."""
    compiled: str = _loaded.compile(kind, text).serialize_json()
    return compiled


def _mask(ids: Iterable[int], vocab_size: int) -> NDArray[np.int32]:
    flags = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    flags[[token_id for token_id in ids if 0 <= token_id < vocab_size]] = 1
    return np.packbits(flags, bitorder="little").view(np.int32)


def _xgrammar() -> Any:
    try:
        import xgrammar
    except ImportError as error:
        raise ResourceError(
            "E_NO_XGRAMMAR",
            "constrained output needs the package `xgrammar`",
            hint="pip install 'qtool[grammar]'",
        ) from error
    return xgrammar
