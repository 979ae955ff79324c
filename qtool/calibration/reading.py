"""`Reading` draws, renders and tokenizes records, a few at a time. It runs in a process with
limits, because files, chat templates and tokenizers come from strangers.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from qtool.calibration.records import Record, records
from qtool.calibration.spec import CalibrationSpec
from qtool.errors import CheckpointRefused, DataRefused, QtoolError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONG_TOKEN = 16  # characters; no ordinary text has so many a token on average
TOKENIZER_HINT = "is tokenizer.json there, and of this model?"
# limits of one step
STEP_S = 0.5
STEP_RECORDS = 64
STEP_BYTES = 16 << 20
STEP_IDS = 1 << 20
MAX_IDS = 16 << 20  # of one record


@dataclass(frozen=True, slots=True)
class Drawn:
    """A record that was drawn."""

    where: str
    """File and line, for messages."""
    most_tokens: int
    """An upper bound of its tokens."""


class Steps(Protocol):
    """The steps from records to token ids: a `Reading`, or one in another process."""

    @property
    def separator(self) -> int | None:
        """The end-of-sequence token."""

    def read(self) -> tuple[list[Drawn], bool]:
        """Draw the next records; return them, and whether there may be more."""

    def render(self) -> int:
        """Render the next conversation among the records that were drawn; return how many records
        are left.
        """

    def encode(self) -> list[list[int]]:
        """Return the token ids of the next records; none when all that were drawn are done."""


class Reading:
    """The records of ``spec``, in the order of the draw. A step ends with the record during which
    half a second is over.

    Args:
        spec: what to read.
        tokenizer: None to read only.
        vocab_size: of the model.
    Raises: DataRefused, naming file, line and field; ResourceError, when the Hub does not answer.
    """

    def __init__(
        self,
        spec: CalibrationSpec,
        tokenizer: PreTrainedTokenizerBase | None = None,
        vocab_size: int = 0,
    ) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._limit = min(spec.seq_len * (spec.num_samples if spec.pack else 1), MAX_IDS)
        self._records = records(spec)
        self._missing = spec.num_samples
        self._drawn: deque[Record] = deque()
        self._rendered: deque[Record] = deque()
        self._error: QtoolError | None = None
        self.separator: int | None = tokenizer.eos_token_id if tokenizer else None

    def read(self) -> tuple[list[Drawn], bool]:
        """Draw the next records. The error of a record is raised by the next call, after those
        before it were returned.
        """
        if self._error:
            raise self._error
        drawn: list[Drawn] = []
        size, step = 0, _Step()
        # no more than may be enough: the next record may cost another pass through a file
        most = min(STEP_RECORDS, self._missing if self._missing > 0 else STEP_RECORDS)
        try:
            for record in self._records:
                drawn.append(Drawn(record.where, record.most_tokens))
                self._missing -= 1
                size += record.most_tokens
                if self._tokenizer is not None:
                    self._drawn.append(record)
                if step.is_over() or len(drawn) >= most or size >= STEP_BYTES:
                    return drawn, True
        except QtoolError as error:
            if not drawn:
                raise
            self._error = error
            return drawn, True
        return drawn, False

    def render(self) -> int:
        """Render the next conversation with the chat template. One at a time, so that the parent
        knows which one does not end.
        """
        assert self._tokenizer is not None
        while self._drawn:
            record = self._drawn.popleft()
            if record.messages and record.ids is None:
                text = _rendered(record, self._tokenizer)
                self._rendered.append(Record(record.where, text, is_rendered=True))
                break
            self._rendered.append(record)
        return len(self._drawn)

    def encode(self) -> list[list[int]]:
        """Return token ids; of a text with far more than are needed only the first."""
        found: list[list[int]] = []
        count, step = 0, _Step()
        while self._rendered and not step.is_over() and count < STEP_IDS:
            ids = self._ids(self._rendered.popleft())
            count += len(ids)
            found.append(ids)
        return found

    def _ids(self, record: Record) -> list[int]:
        assert self._tokenizer is not None
        try:
            ids = _token_ids(record, self._tokenizer, self._limit)
        except MemoryError:
            raise
        except Exception as error:  # a tokenizer is a program too
            raise CheckpointRefused(
                "E_TOKENIZER",
                f"{record.where}: the tokenizer fails on this text: {one_line(error)}",
                hint=TOKENIZER_HINT,
            ) from error
        if max(ids, default=0) >= self._vocab_size:
            raise DataRefused(
                "E_DATA_VOCAB",
                f"{record.where}: token id {max(ids)} is outside the model's vocabulary of "
                f"{self._vocab_size}",
                hint="tokenize with the tokenizer of this very model",
            )
        return list(ids[: self._limit + 1])


def encoded(steps: Steps) -> Iterator[tuple[str, list[int]]]:
    """Yield where each record comes from, and its token ids."""
    more = True
    while more:
        drawn, more = steps.read()
        waiting = deque(record.where for record in drawn)
        while waiting:
            steps.render()
            for ids in steps.encode():
                yield waiting.popleft(), ids


class _Step:
    """The time limit of one step."""

    def __init__(self) -> None:
        self._end = time.monotonic() + STEP_S

    def is_over(self) -> bool:
        return time.monotonic() > self._end


def _token_ids(record: Record, tokenizer: PreTrainedTokenizerBase, limit: int) -> Sequence[int]:
    """Return the ids of ``record``; of a text with far more than ``limit`` only its first ids, and
    more than ``limit`` of them.
    """
    if record.ids is not None:
        return record.ids
    text = record.text
    if not text.strip():
        return ()
    for part in (text[: limit * LONG_TOKEN], text):
        ids: list[int] = tokenizer(part, add_special_tokens=not record.is_rendered, verbose=False)[
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
    except MemoryError:
        raise
    except Exception as error:  # a template is a program, and raises anything
        hint = "roles and their order must be those that the model's chat template knows"
        raise DataRefused(
            "E_DATA_TEMPLATE",
            f"{record.where}: the chat template refuses these messages: {one_line(error)}",
            hint=hint,
        ) from error
    return text
