"""The model's tokenizer: text to tokens outside the event loop, and the text and bytes of single
tokens.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from functools import lru_cache

from tokenizers import Tokenizer

from qtool.errors import UsageError
from qtool.serve.threads import Threads

# cost of decoding a token, encoding a character, and of each text, in bytes for `Threads`
TOKEN_BYTES = 16
CHARACTER_BYTES = 16
TEXT_BYTES = 128
MAX_TOKENS = (
    1 << 20
)  # of a text, or the context's length if it is more: making the list holds the GIL
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # what SentencePiece writes for a space


def prompt_too_long(size: str, context_length: int) -> UsageError:
    """Return the error for a prompt that leaves no room for an answer.

    Clients know it by its text, so it has OpenAI's words and SGLang's. Source: litellm
    `litellm_core_utils/exception_mapping_utils.py`.
    """
    return UsageError(
        "E_TOO_LONG",
        f"This model's maximum context length is {context_length} tokens. The prompt ({size}) is "
        "longer than the model's context length",
        hint="shorten the prompt",
    )


def answer_too_long(prompt_tokens: int, new_tokens: int, context_length: int) -> UsageError:
    """Return the error for a prompt that fits without the answer that is asked for."""
    return UsageError(
        "E_TOO_LONG",
        f"This model's maximum context length is {context_length} tokens. Requested token count "
        f"exceeds the model's maximum context length: {prompt_tokens} tokens in the prompt and "
        f"{new_tokens} for the answer",
        hint="shorten the prompt, or lower max_tokens",
    )


class Vocabulary:
    """The tokenizer of a model, which may have none."""

    def __init__(self, text: str, context_length: int, threads: Threads) -> None:
        """Load the tokenizer.

        Args:
            text: a tokenizer.json; empty if there is no tokenizer.
            context_length: of the model, in tokens.
            threads: for long texts.
        """
        self._tokenizer = Tokenizer.from_str(text) if text else None
        self._threads = threads
        self._context_length = context_length
        self._characters: dict[str, int] = _byte_level_characters() if '"ByteLevel"' in text else {}
        self._added: set[int] = set()
        self._special: set[int] = set()
        self._max_characters = 0
        if self._tokenizer is not None:
            added = self._tokenizer.get_added_tokens_decoder()
            self._added = set(added)
            self._special = {token for token, one in added.items() if one.special}
            longest = max(map(len, self._tokenizer.get_vocab()), default=1)
            # of a prompt that fits into the context
            self._max_characters = longest * context_length
        self.bytes_of = lru_cache(maxsize=1 << 16)(self._bytes_of)
        self.byte_list_of = lru_cache(maxsize=1 << 16)(lambda token: [*self.bytes_of(token)])
        """The same as a list, as in OpenAI's log probabilities; callers must not change it."""

    async def encode(
        self, texts: Sequence[str], *, add_special_tokens: bool = True
    ) -> list[list[int]]:
        """Return the tokens of each of ``texts``.

        Raises: UsageError, if there is no tokenizer or the context cannot hold a text.
        """
        return await self._encode(texts, [*map(len, texts)], add_special_tokens)

    async def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[list[int]]:
        """Return the tokens of each of ``pairs``, put together as the tokenizer says.

        Raises: as `encode`.
        """
        sizes = [len(first) + len(second) for first, second in pairs]
        return await self._encode(pairs, sizes, True)

    async def _encode(
        self,
        inputs: Sequence[str] | Sequence[tuple[str, str]],
        sizes: Sequence[int],
        add_special_tokens: bool,
    ) -> list[list[int]]:
        """Return the tokens of ``inputs``, which have ``sizes`` characters."""
        tokenizer = self._require_tokenizer()
        longest = max(sizes, default=0)
        if longest > self._max_characters:
            raise prompt_too_long(f"{longest:,} characters", self._context_length)

        def encode_all() -> list[list[int]]:
            # `encode` holds the GIL, `encode_batch_fast` releases it
            encoded = tokenizer.encode_batch_fast(
                list(inputs), add_special_tokens=add_special_tokens
            )
            most = max(map(len, encoded), default=0)
            if most > max(MAX_TOKENS, self._context_length):
                raise prompt_too_long(f"{most:,} tokens", self._context_length)
            return [one.ids for one in encoded]

        size = CHARACTER_BYTES * sum(sizes) + TEXT_BYTES * len(sizes)
        return await self._threads.run(size, encode_all)

    async def decode(
        self, lists: Sequence[Sequence[int]], *, skip_special_tokens: bool = False
    ) -> list[str]:
        """Return the text of each of ``lists`` of tokens."""
        tokenizer = self._require_tokenizer()
        size = TOKEN_BYTES * sum(map(len, lists))
        return await self._threads.run(
            size, lambda: tokenizer.decode_batch(lists, skip_special_tokens=skip_special_tokens)
        )

    def text_of(self, token: int) -> str:
        """Return ``token`` as text, with replacement characters for parts of characters."""
        return self.bytes_of(token).decode(errors="replace")

    def label_of(self, token: int) -> str:
        """Return ``token`` as text, or as ``bytes:\\xe2\\x80`` if it is not valid UTF-8, like
        OpenAI's completions.
        """
        data = self.bytes_of(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    async def names_of(self, tokens: Sequence[int]) -> list[str]:
        """Return the names of ``tokens`` in the vocabulary."""
        tokenizer = self._require_tokenizer()
        return await self._threads.run(
            TOKEN_BYTES * len(tokens),
            lambda: [tokenizer.id_to_token(token) or "" for token in tokens],
        )

    def is_special(self, token: int) -> bool:
        """Whether `skip_special_tokens` leaves out ``token``."""
        return token in self._special

    def _bytes_of(self, token: int) -> bytes:
        """Return the bytes of ``token``, perhaps part of a character; none without a tokenizer."""
        name = self._tokenizer.id_to_token(token) if self._tokenizer else None
        if name is None:
            return b""
        if token in self._added:
            return name.encode()
        if self._characters and all(letter in self._characters for letter in name):
            return bytes(self._characters[letter] for letter in name)
        if found := BYTE_TOKEN.fullmatch(name):
            return bytes.fromhex(found[1])
        return name.replace(SPACE, " ").encode()

    def _require_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise UsageError(
                "E_NO_TOKENIZER",
                "the server runs without a tokenizer",
                hint="send tokens to /generate, as input_ids",
            )
        return self._tokenizer


class Offsets:
    """Finds where in a text its tokens begin, in characters, one token after the other.

    A token that begins inside of a character begins where the character does.
    """

    def __init__(self, vocabulary: Vocabulary, start: int) -> None:
        """Begin with the first token.

        Args:
            vocabulary: of the tokens.
            start: where the first token begins; negative if a tokenizer added it, and perhaps
                others, in front of the text.
        """
        self._vocabulary = vocabulary
        self._next = start
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int, *, skip_special_tokens: bool = False) -> int:
        """Return where ``token`` begins."""
        here = max(self._next, 0)
        if not (skip_special_tokens and self._vocabulary.is_special(token)):
            self._next += len(self._decoder.decode(self._vocabulary.bytes_of(token)))
        return here


def _byte_level_characters() -> dict[str, int]:
    """Return the byte for each character of a byte-level vocabulary.

    Source: Radford et al. 2019, GPT-2's `encoder.py`.
    """
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {
        chr(256 + number): byte for number, byte in enumerate(hidden)
    }
