"""From records to samples: token ids, cut or packed to one length."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from qtool.calibration.isolated import isolated_reading
from qtool.calibration.reading import LONG_TOKEN, Steps, encoded
from qtool.calibration.spec import MIN_TOKENS, CalibrationSpec
from qtool.errors import DataRefused


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
    """Read the records that a run would draw, without a tokenizer, in a process of its own. With
    ``pack`` their number is estimated, rather too high.

    Raises: DataRefused, naming file, line and field; ResourceError, when the Hub does not answer.
    """
    with isolated_reading(spec) as steps:
        check_records(spec, steps)


def check_records(spec: CalibrationSpec, steps: Steps) -> None:
    """Check the records that ``steps`` draws, as `check_source` does."""
    missing = spec.num_samples * (spec.seq_len * LONG_TOKEN if spec.pack else 1)
    total, longest, more = 0, (0, ""), True
    while more:
        drawn, more = steps.read()
        for record in drawn:
            size = record.most_tokens
            total, longest = total + size, max(longest, (size, record.where))
            missing -= size if spec.pack else size >= MIN_TOKENS
            if missing <= 0:
                return
    if (total if spec.pack else longest[0]) < MIN_TOKENS:
        raise _useless(longest)


def load_calibration(spec: CalibrationSpec, steps: Steps) -> CalibrationSet:
    """Cut the samples from the records that ``steps`` draws and tokenizes; the same spec and
    tokenizer give the same samples in the same order.

    Texts get the special tokens that the tokenizer adds by itself, messages those of its chat
    template, ``input_ids`` none. Packed, they are joined with the end-of-sequence token between
    them and cut every ``seq_len`` tokens; else each is cut to its first ``seq_len`` tokens.
    The tokenizer is never asked to truncate or pad: it would keep that, and save it.

    Raises: DataRefused, naming file, line and field; ResourceError, when the Hub does not answer.
    """
    texts = _Texts(steps)
    pieces: Iterable[Sequence[int]] = texts
    if spec.pack:
        pieces = _pack(texts, spec.seq_len, steps.separator)
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
        raise _useless(texts.longest)
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
    """The token ids of each record, in the order of the draw."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self.longest = (0, "")
        """Tokens of the longest record so far, and where it stands."""

    def __iter__(self) -> Iterator[Sequence[int]]:
        for where, ids in encoded(self._steps):
            self.longest = max(self.longest, (len(ids), where))
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


def _useless(longest: tuple[int, str]) -> DataRefused:
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
