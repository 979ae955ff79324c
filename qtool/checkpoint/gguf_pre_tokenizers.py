"""How text is cut before the merges of a byte-level BPE, by the names that llama.cpp has for it.

Sources: llama.cpp, `llama-vocab.cpp`; the tokenizer.json of the models.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

_ENGLISH = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_START = r"[^\r\n\p{L}\p{N}]?"
_WORDS = rf"{_START}\p{{L}}+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_OTHERS = r" ?[^\s\p{L}\p{N}]+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"{_START}{_UPPER}*{_LOWER}+", rf"{_START}{_UPPER}+{_LOWER}*")


@dataclass(frozen=True)
class PreTokenizer:
    """How text is cut before the merges of a byte-level BPE."""

    pattern: str = ""
    """What is kept together, as tokenizer.json has it; empty for GPT-2's own pattern."""
    single_digits: bool = False
    """Whether digits are cut apart first."""
    is_nfc: bool = False
    """Whether text is normalized to NFC first."""
    ignore_merges: bool = False
    """Whether a piece that is a token is that, whatever the merges say."""
    add_bos: bool = False
    """Whether text begins with the BOS token, where the file does not say."""


_LLAMA3 = PreTokenizer(
    rf"{_ENGLISH}|{_WORDS}|\p{{N}}{{1,3}}|{_OTHERS}[\r\n]*|{_SPACES}",
    ignore_merges=True,
    add_bos=True,
)
_QWEN2 = PreTokenizer(rf"{_ENGLISH}|{_WORDS}|\p{{N}}|{_OTHERS}[\r\n]*|{_SPACES}", is_nfc=True)
_GPT2 = PreTokenizer()
PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    **dict.fromkeys(("gpt-2", "default"), _GPT2),
    "smollm": PreTokenizer(single_digits=True),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), _LLAMA3),
    "smaug-bpe": replace(_LLAMA3, ignore_merges=False, add_bos=False),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2),
    "tekken": PreTokenizer(
        rf"{'|'.join(_CASED)}|\p{{N}}|{_OTHERS}[\r\n/]*|{_SPACES}",
        ignore_merges=True,
        add_bos=True,
    ),
    "gpt-4o": PreTokenizer(
        rf"{'|'.join(f'{each}{_ENGLISH}?' for each in _CASED)}|\p{{N}}{{1,3}}|{_OTHERS}[\r\n/]*"
        rf"|{_SPACES}"
    ),
}
"""By what `tokenizer.ggml.pre` calls them; the name that is written stands first."""
