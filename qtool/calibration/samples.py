"""From records to samples: token ids, cut or packed to one length."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qtool.calibration.records import Record, records
from qtool.calibration.sources import MIN_TOKENS, CalibrationSpec
from qtool.errors import DataRefused, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONG_TOKEN = 16  # characters; no ordinary text has so many a token on average


@dataclass(frozen=True)
class CalibrationReport:
    """What became of the data."""

    source: str
    used: int
    """Samples."""
    tokens: int
    """Tokens in these samples."""
    dropped: int
    """Texts shorter than 11 tokens; packed: the empty texts, and the rest at the end."""
    truncated: int
    """Texts cut to ``seq_len``."""
    digest: str
    """sha256 of the samples, each as its length and its ids, little-endian uint32."""


@dataclass(frozen=True)
class CalibrationSet:
    """Token ids of the samples in drawn order, each 11 to ``seq_len`` long, unpadded, below the
    vocabulary size.
    """

    samples: tuple[tuple[int, ...], ...]
    report: CalibrationReport


def check_source(spec: CalibrationSpec) -> None:
    """Read the records that a run would draw, without a tokenizer; with ``pack`` that is an
    estimate which errs to more records.

    Raises: DataRefused, naming file, line and field; ResourceError, when the Hub does not answer.
    """
    missing = spec.num_samples * (spec.seq_len * LONG_TOKEN if spec.pack else 1)
    total, longest = 0, (0, "")
    for record in records(spec):
        size = record.most_tokens
        total, longest = total + size, max(longest, (size, record.where))
        missing -= size if spec.pack else size >= MIN_TOKENS
        if missing <= 0:
            return
    if (total if spec.pack else longest[0]) < MIN_TOKENS:
        raise _useless(spec, longest)


def load_calibration(
    spec: CalibrationSpec, tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> CalibrationSet:
    """Draw, tokenize and cut the samples; the same spec and tokenizer give the same samples in the
    same order.

    Texts get the special tokens that the tokenizer adds by itself, messages those of its chat
    template, ``input_ids`` none. Packed, they are joined with the end-of-sequence token between
    them and cut every ``seq_len`` tokens; else each is cut to its first ``seq_len`` tokens.
    The tokenizer is never asked to truncate or pad: it would keep that, and save it.

    Raises: DataRefused, naming file, line and field; ResourceError, when the Hub does not answer.
    """
    texts = _Texts(spec, tokenizer, vocab_size)
    pieces: Iterable[Sequence[int]] = texts
    if spec.pack:
        pieces = _pack(texts, spec.seq_len, tokenizer.eos_token_id)
    samples: list[tuple[int, ...]] = []
    dropped = truncated = 0
    for ids in pieces:
        if len(ids) < MIN_TOKENS:
            dropped += 1
            continue
        truncated += len(ids) > spec.seq_len
        samples.append(tuple(ids[: spec.seq_len]))
        if len(samples) == spec.num_samples:
            break
    if not samples:
        raise _useless(spec, texts.longest)
    packed = (struct.pack(f"<{len(ids) + 1}I", len(ids), *ids) for ids in samples)
    report = CalibrationReport(
        source=spec.source,
        used=len(samples),
        tokens=sum(map(len, samples)),
        dropped=dropped,
        truncated=truncated,
        digest=hashlib.sha256(b"".join(packed)).hexdigest(),
    )
    return CalibrationSet(tuple(samples), report)


class _Texts:
    """The token ids of each record of ``spec``, in the order of the draw."""

    def __init__(
        self, spec: CalibrationSpec, tokenizer: PreTrainedTokenizerBase, vocab_size: int
    ) -> None:
        self._spec, self._tokenizer, self._vocab_size = spec, tokenizer, vocab_size
        self.longest = (0, "")
        """Tokens of the longest record so far, and where it stands."""

    def __iter__(self) -> Iterator[Sequence[int]]:
        spec = self._spec
        limit = spec.seq_len * (spec.num_samples if spec.pack else 1)
        for record in records(spec):
            ids = _token_ids(record, self._tokenizer, limit)
            if max(ids, default=0) >= self._vocab_size:
                raise DataRefused(
                    "E_DATA_VOCAB",
                    f"{record.where}: token id {max(ids)} is outside the model's vocabulary of "
                    f"{self._vocab_size}",
                    hint="tokenize with the tokenizer of this very model",
                )
            self.longest = max(self.longest, (len(ids), record.where))
            yield ids


def _pack(
    texts: Iterable[Sequence[int]], seq_len: int, separator: int | None
) -> Iterator[Sequence[int]]:
    """Yield pieces of ``seq_len`` tokens of the joined texts, then the rest.

    Empty texts are passed on, to be counted.
    """
    rest: list[int] = []
    last = separator
    for ids in texts:
        if not ids:
            yield ids
            continue
        if separator is not None and last != separator:
            rest.append(separator)
        rest += ids
        last = ids[-1]
        cut = len(rest) - len(rest) % seq_len
        yield from (rest[start : start + seq_len] for start in range(0, cut, seq_len))
        rest = rest[cut:]
    if rest:
        yield rest


def _token_ids(record: Record, tokenizer: PreTrainedTokenizerBase, limit: int) -> Sequence[int]:
    """Return the ids of ``record``; of a text with far more than ``limit`` only its first ids, and
    more than ``limit`` of them.
    """
    if record.ids is not None:
        return record.ids
    text = _rendered(record, tokenizer) if record.messages else record.text
    if not text.strip():
        return ()
    for part in (text[: limit * LONG_TOKEN], text):
        ids: list[int] = tokenizer(part, add_special_tokens=not record.messages, verbose=False)[
            "input_ids"
        ]
        # a cut changes the last ids; the first half stays as it is
        if len(ids) >= 2 * limit or len(part) == len(text):
            break
    return ids


def _rendered(record: Record, tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        hint = "give plain `text`, or name another field with --text-column"
        raise DataRefused(
            "E_DATA_TEMPLATE",
            f"{record.where}: messages need a chat template, and this tokenizer has none",
            hint=hint,
        )
    try:
        text: str = tokenizer.apply_chat_template(record.messages, tokenize=False)
        text.encode()
    except Exception as error:  # a template is a program, and raises anything
        hint = "roles and their order must be those that the model's chat template knows"
        raise DataRefused(
            "E_DATA_TEMPLATE",
            f"{record.where}: the chat template refuses these messages: {one_line(error)}",
            hint=hint,
        ) from error
    return text


def _useless(spec: CalibrationSpec, longest: tuple[int, str]) -> DataRefused:
    size, where = longest
    message = f"{where}: the longest record gives {size} tokens at most; {MIN_TOKENS} are the least"
    return DataRefused(
        "E_DATA_USELESS",
        message,
        hint=(
            "use longer texts, join short ones with --pack, or name another field with "
            "--text-column"
        ),
    )
