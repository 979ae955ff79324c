"""The tokenizer of a checkpoint in the metadata of a GGUF file.

Source: llama.cpp, `conversion/base.py` and `src/llama-vocab.cpp`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

import gguf

from qtool.checkpoint import Checkpoint
from qtool.checkpoint.gguf_pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from qtool.checkpoint.strict_json import Json, read_json
from qtool.errors import CheckpointRefused, one_line

TOKENIZER = "tokenizer.json"
SPACE = "\u2581"
BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
LOOKS_SPECIAL = re.compile(
    r"<\|.*\|>|<｜.*｜>|<unused.*>|<pad>|<mask>|<2mass>|\[@BOS@\]", re.DOTALL
)
ADDED_SCORE = -1000.0
BYTE_LEVEL = "byte level"
DIGITS = "digits"


NAMES = {known: name for name, known in reversed(PRE_TOKENIZERS.items())}
"""Each way of cutting text -> its first name in ``tokenizer.ggml.pre``."""


def describe_vocabulary(
    writer: gguf.GGUFWriter, checkpoint: Checkpoint, size: int, *, is_gemma: bool
) -> None:
    """Write the tokenizer of ``checkpoint`` into the metadata of ``writer``.

    Args:
        size: rows of the embeddings; there is a token for each.
        is_gemma: whether text begins without a space, whatever the tokenizer says.
    Raises: CheckpointRefused, when llama.cpp has no tokenizer that cuts text in the same way.
    """
    path = checkpoint.path / TOKENIZER
    if not path.is_file():
        raise _unknown(checkpoint, f"it has no {TOKENIZER}")
    tokenizer = read_json(path)
    model = tokenizer.get("model")
    if not isinstance(model, Mapping) or model.get("type") != "BPE":
        kind = model.get("type") if isinstance(model, Mapping) else None
        raise _unknown(checkpoint, f"its model is `{kind}`, and not BPE")
    vocabulary = _Vocabulary(checkpoint, tokenizer, model, size)
    is_sentencepiece = bool(model.get("byte_fallback"))
    if is_sentencepiece:
        _describe_sentencepiece(writer, vocabulary, is_gemma=is_gemma)
    else:
        _describe_bpe(writer, vocabulary)
    logging.getLogger("gguf.vocab").setLevel(logging.ERROR)  # its warnings name no fault here
    try:
        special = gguf.SpecialVocab(checkpoint.path, load_merges=not is_sentencepiece, n_vocab=size)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise _unknown(checkpoint, f"its special tokens: {one_line(error)}") from error
    special.add_special_token.setdefault("bos", False)
    special.add_to_gguf(writer, quiet=True)


class _Vocabulary:
    """The tokens of a tokenizer.json, in the order of their numbers."""

    def __init__(
        self, checkpoint: Checkpoint, tokenizer: Json, model: Mapping[str, Any], size: int
    ) -> None:
        self.checkpoint = checkpoint
        self.tokenizer = tokenizer
        self.model = model
        self.size = size
        self.tokens = {number: token for token, number in model["vocab"].items()}
        self.added = {each["id"]: each for each in tokenizer.get("added_tokens") or ()}
        largest = max((*self.tokens, *self.added), default=0)
        if largest >= size:
            raise _unknown(
                checkpoint, f"it has token {largest}, and the model has embeddings of {size}"
            )

    def entries(self) -> Iterator[tuple[str, gguf.TokenType]]:
        """Yield each token and its kind; numbers without a token get one that nothing writes."""
        unknown = self.model.get("unk_token")
        for number in range(self.size):
            if number in self.added:
                yield self._added(self.added[number])
            elif number not in self.tokens:
                yield f"[PAD{number}]", gguf.TokenType.UNUSED
            elif self.tokens[number] == unknown:
                yield unknown, gguf.TokenType.UNKNOWN
            elif self.model.get("byte_fallback") and BYTE.fullmatch(self.tokens[number]):
                yield self.tokens[number], gguf.TokenType.BYTE
            else:
                yield self.tokens[number], gguf.TokenType.NORMAL

    def _added(self, token: Mapping[str, Any]) -> tuple[str, gguf.TokenType]:
        content = token["content"]
        if content == self.model.get("unk_token") and self.model.get("byte_fallback"):
            return content, gguf.TokenType.UNKNOWN
        if token.get("special") or LOOKS_SPECIAL.fullmatch(content):
            return content, gguf.TokenType.CONTROL
        return content.replace(SPACE, " "), gguf.TokenType.USER_DEFINED

    def describe(self, writer: gguf.GGUFWriter) -> list[str]:
        """Write tokens and kinds; return the tokens."""
        tokens, kinds = zip(*self.entries(), strict=True)
        writer.add_token_list(tokens)
        writer.add_token_types(kinds)
        return list(tokens)


def _describe_bpe(writer: gguf.GGUFWriter, vocabulary: _Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_of(vocabulary.checkpoint, vocabulary.tokenizer))
    vocabulary.describe(writer)


def _describe_sentencepiece(
    writer: gguf.GGUFWriter, vocabulary: _Vocabulary, *, is_gemma: bool
) -> None:
    """Write tokens with the scores that make llama.cpp merge in the order of the merges."""
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    tokens = vocabulary.describe(writer)
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(vocabulary.model.get("merges") or ()):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        ranks.setdefault(left + right, rank)
    last = len(ranks)
    writer.add_token_scores(
        [
            ADDED_SCORE if number in vocabulary.added else -float(ranks.get(token, last))
            for number, token in enumerate(tokens)
        ]
    )
    writer.add_add_space_prefix(not is_gemma and _has_space_prefix(vocabulary))


def _has_space_prefix(vocabulary: _Vocabulary) -> bool:
    """Whether text begins with a space; CheckpointRefused when spaces are not `SPACE`."""
    normalizer = vocabulary.tokenizer.get("normalizer") or {}
    before = vocabulary.tokenizer.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers") or [normalizer]
    kinds = [step.get("type") for step in steps if step]
    if set(kinds) - {"Prepend", "Replace"}:
        raise _unknown(vocabulary.checkpoint, f"its normalizer is {kinds}")
    if before.get("type") == "Metaspace":
        return bool(before.get("prepend_scheme", "always") != "never")
    if before and before.get("type") != "Split":
        raise _unknown(vocabulary.checkpoint, f"its pre_tokenizer is `{before.get('type')}`")
    return "Prepend" in kinds


def pre_tokenizer_of(checkpoint: Checkpoint, tokenizer: Json) -> str:
    """Return the name under which llama.cpp knows how ``tokenizer`` cuts text.

    Raises: CheckpointRefused, when it does not know it.
    """
    normalizer = (tokenizer.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):  # llama.cpp leaves out NFC of Qwen
        raise _unknown(checkpoint, f"its normalizer is `{normalizer}`")
    pieces = _pieces(tokenizer)
    ignore_merges = bool(tokenizer["model"].get("ignore_merges"))
    same = {
        known.ignore_merges: name for known, name in NAMES.items() if pieces_of(known) == pieces
    }
    if ignore_merges in same:
        return same[ignore_merges]
    if same:
        shown = f"`{next(iter(same.values()))}` with ignore_merges {ignore_merges}"
    else:
        shown = f"`{', '.join(str(piece)[:60] for piece in pieces)}`"
    raise _unknown(checkpoint, f"its pre-tokenizer is {shown}")


def pieces_of(known: PreTokenizer) -> tuple[str, ...]:
    """Return the steps of ``known``: regular expressions, `DIGITS` and `BYTE_LEVEL`."""
    if known.pattern:
        return (known.pattern,)
    return (DIGITS, BYTE_LEVEL) if known.single_digits else (BYTE_LEVEL,)


def _pieces(tokenizer: Json) -> tuple[str | None, ...]:
    """Return the steps of the pre-tokenizer of ``tokenizer``, as `pieces_of` does."""
    found = tokenizer.get("pre_tokenizer") or {}
    pieces = tuple(_piece(step) for step in found.get("pretokenizers") or [found])
    # the last step makes bytes of what is already cut
    return pieces[:-1] if len(pieces) > 1 and pieces[-1] is None else pieces


def _piece(step: Mapping[str, Any]) -> str | None:
    """Return what one step of a pre-tokenizer does; None when it only makes bytes."""
    kind = step.get("type")
    if kind == "ByteLevel":
        if step.get("add_prefix_space"):
            return "ByteLevel with add_prefix_space"
        return BYTE_LEVEL if step.get("use_regex", True) else None
    if kind == "Digits" and step.get("individual_digits"):
        return DIGITS
    pattern = step.get("pattern")
    behavior = (step.get("behavior"), bool(step.get("invert")))
    cuts = kind == "Split" and behavior in (("Isolated", False), ("Removed", True))
    return str(pattern.get("Regex")) if cuts and isinstance(pattern, Mapping) else str(kind)


def _unknown(checkpoint: Checkpoint, why: str) -> CheckpointRefused:
    return CheckpointRefused(
        "E_GGUF_TOKENIZER",
        f"{checkpoint.source}: llama.cpp has no tokenizer like that of the model: {why}",
        hint=(
            f"it knows the byte-level BPE of {', '.join(NAMES.values())} and BPE of SentencePiece"
        ),
    )
