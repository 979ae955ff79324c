"""The data that models are compared on: documents as token ids, cut into windows."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qtool.calibration import CalibrationSpec
from qtool.calibration.isolated import isolated_tokenizing
from qtool.calibration.reading import encoded
from qtool.calibration.sources import is_hub_source
from qtool.checkpoint import Checkpoint
from qtool.errors import DataRefused

MIN_TOKENS = 2  # one to see and one to predict
MAX_DOCUMENTS = 1_000_000


@dataclass(frozen=True)
class Document:
    """One text."""

    where: str
    """File and line."""

    ids: tuple[int, ...]
    """Token ids, special tokens included."""


@dataclass(frozen=True)
class Window:
    """A piece of a document that a model sees at once, and which of its tokens count."""

    document: int
    """Index into the documents."""

    start: int
    """Where the piece begins in its document."""

    ids: tuple[int, ...]
    """The tokens of the piece."""

    first: int
    """The first token of the piece that counts; those before it are context, or were counted."""

    @property
    def count(self) -> int:
        """How many tokens count."""
        return len(self.ids) - self.first


@dataclass(frozen=True)
class TextSpec:
    """Which texts, and how they are cut."""

    source: str
    """A .jsonl, .json, .txt or .parquet file, or a Hub data set name[:config][:split]."""

    text_column: str | None
    """The field that holds the text."""

    max_tokens: int
    """Tokens of all documents together, at most."""

    seq_len: int
    """Tokens of a window, at most."""

    stride: int
    """How far the next window of a document begins after the last one."""

    seed: int
    """Decides which documents are drawn, and in which order."""


def read_documents(
    spec: TextSpec, tokenizer: Path, vocab_size: int, *, trust_remote_code: bool = False
) -> list[Document]:
    """Draw documents until there are ``max_tokens``, and tokenize them in a process with limits.

    Args:
        spec: which texts.
        tokenizer: a folder with a tokenizer.
        vocab_size: of the model; token ids are below it.
        trust_remote_code: whether code that comes with the tokenizer may run.
    Raises: DataRefused, when the data cannot be read or no document has two tokens;
        CheckpointRefused, for a tokenizer that fails.
    """
    is_hub = is_hub_source(spec.source)
    drawn = CalibrationSpec(
        source=spec.source if is_hub else str(Path(spec.source).absolute()),
        text_column=spec.text_column,
        num_samples=MAX_DOCUMENTS,
        seq_len=max(spec.max_tokens, MIN_TOKENS + 9),
        seed=spec.seed,
    )
    documents: list[Document] = []
    left = spec.max_tokens
    with isolated_tokenizing(
        drawn, tokenizer, vocab_size, trust_remote_code=trust_remote_code
    ) as steps:
        for where, ids in encoded(steps):
            if len(ids) >= MIN_TOKENS:
                documents.append(Document(where, tuple(ids[:left])))
                left -= len(documents[-1].ids)
            if left < MIN_TOKENS:
                break
    if not documents:
        raise DataRefused(
            "E_NO_TOKENS",
            f"{spec.source} has no text of two tokens or more to measure on",
            hint="give some dozen texts of the kind that the model will serve",
        )
    return documents


def vocab_size(checkpoint: Checkpoint) -> int:
    """Return how many tokens the config says that the model knows; a number that no tokenizer
    reaches where it does not say.
    """
    size = checkpoint.text_config.get("vocab_size")
    return size if isinstance(size, int) else sys.maxsize


def cut_windows(documents: Sequence[Document], seq_len: int, stride: int) -> list[Window]:
    """Return the windows of ``documents``: each token but a document's first counts once, in the
    first window that has a token before it.

    Where ``stride`` is ``seq_len``, windows do not overlap, and the first token of each is never
    counted.
    """
    return [
        window
        for number, document in enumerate(documents)
        for window in _windows_of(number, document.ids, seq_len, stride)
    ]


def _windows_of(number: int, ids: tuple[int, ...], seq_len: int, stride: int) -> Iterator[Window]:
    counted = 1
    for start in range(0, len(ids), stride):
        piece = ids[start : start + seq_len]
        first = max(counted - start, 1)
        if first < len(piece):
            yield Window(number, start, piece, first)
        counted = start + len(piece)
        if counted == len(ids):
            return


def texts_digest(windows: Sequence[Window]) -> str:
    """Return a sha256 of the tokens and of how they are cut."""
    digest = hashlib.sha256()
    for window in windows:
        digest.update(np.array([window.first, len(window.ids), *window.ids], "<u4").tobytes())
    return digest.hexdigest()
