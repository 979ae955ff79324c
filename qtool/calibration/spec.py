"""`CalibrationSpec`: which calibration data, and in which order it is drawn."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from qtool.errors import UsageError

MIN_TOKENS = 11  # GPTQModel 7.6 drops rows of 10 tokens and fewer; one rule for every backend
# what a record is searched for, besides --text-column
FIELDS = (
    "input_ids",
    "messages",
    "prompt",
    "completion",
    "text",
)


@dataclass(frozen=True)
class CalibrationSpec:
    """Which data, and how it is cut.

    Raises: UsageError, when a number is too small to calibrate with.
    """

    source: str
    """A .jsonl, .json, .txt or .parquet file, or a Hub data set name[:config][:split]."""
    text_column: str | None = None
    """The field that holds the text; None: one of `FIELDS`."""
    num_samples: int = 512
    seq_len: int = 2048
    """Tokens of a sample, at most."""
    seed: int = 0
    """Decides the order in which records are drawn."""
    pack: bool = False
    """Join the texts and cut them into pieces of ``seq_len`` tokens."""
    batch_size: int = 1
    """Samples that a backend sees at a time."""

    def __post_init__(self) -> None:
        for name, least in (("num_samples", 1), ("seq_len", MIN_TOKENS), ("batch_size", 1)):
            if getattr(self, name) < least:
                message = (
                    f"--{name.replace('_', '-')} is {getattr(self, name)}; the least is {least}"
                )
                raise UsageError(
                    "E_CALIBRATION_SIZE",
                    message,
                    hint="the defaults are 512 samples of 2048 tokens, one at a time",
                )


Rows = Iterator[tuple[str, object]]  # where the record stands, for messages; the record


def shuffled(count: int, seed: int) -> Iterator[int]:
    """Yield 0 to ``count - 1`` in random order; memory grows with what is drawn, not with ``count``
    (a sparse Fisher-Yates shuffle).
    """
    draw = random.Random(seed)
    moved: dict[int, int] = {}
    for position in range(count):
        chosen = draw.randrange(position, count)
        here = moved.pop(position, position)
        if chosen == position:
            yield here
        else:
            yield moved.get(chosen, chosen)
            moved[chosen] = here
