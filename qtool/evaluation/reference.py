"""The reference's log-probabilities, kept in a file: for models that do not fit side by side, and
for the next evaluation against the same reference.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qtool import __version__
from qtool.checkpoint import Checkpoint
from qtool.checkpoint.aux_files import replace_text
from qtool.checkpoint.digests import sample_files
from qtool.errors import ResourceError
from qtool.evaluation.texts import Window, texts_digest
from qtool.sizes import format_size

SUFFIX = ".logprobs"
MIN_FREE_SHARE = 1.05  # of what the file needs
MAX_ERROR = 0.05  # nats: of the log of a sum of probabilities, after rounding to float16


@dataclass(frozen=True)
class ReferenceFile:
    """Log-probabilities [N, V], float16, of the tokens that follow N tokens, and greedy answers
    beside them.
    """

    path: Path
    rows: int
    vocab_size: int

    @property
    def is_complete(self) -> bool:
        """Whether the file was written to its end."""
        return self.path.is_file() and self.path.stat().st_size == self.rows * self.vocab_size * 2

    @property
    def _answers(self) -> Path:
        return self.path.with_suffix(".answers.json")

    def check_output(self) -> None:
        """Make the folder. Raises: ResourceError, when nothing can be written there, or the disk
        has no room.
        """
        folder = self.path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise ResourceError(
                "E_OUTPUT_PLACE",
                f"{folder}: cannot write there: {error.strerror}",
                hint="name another folder with --cache-dir",
            ) from error
        need = self.rows * self.vocab_size * 2
        status = os.statvfs(folder)
        if status.f_bavail * status.f_frsize < need * MIN_FREE_SHARE:
            raise self._no_room()

    def _no_room(self) -> ResourceError:
        need = self.rows * self.vocab_size * 2
        return ResourceError(
            "E_DISK",
            f"the reference's log-probabilities need {format_size(need)} in {self.path.parent}",
            hint="lower --max-tokens, or name another disk with --cache-dir",
        )

    @contextlib.contextmanager
    def writing(self) -> Iterator[NDArray[np.float16]]:
        """Give the array to fill; the file gets its name when the block ends."""
        folder = self.path.parent
        handle, name = tempfile.mkstemp(dir=folder, prefix=".writing-")
        try:
            self._reserve(handle)
            array = np.memmap(name, np.float16, "r+", shape=(self.rows, self.vocab_size))
            yield array
            array.flush()
            Path(name).rename(self.path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    def _reserve(self, handle: int) -> None:
        """Take the room of the whole file: to write to a mapped file on a full disk ends a process
        without a word.
        """
        try:
            os.posix_fallocate(handle, 0, self.rows * self.vocab_size * 2)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise self._no_room() from error
            raise
        finally:
            os.close(handle)

    def read(self) -> NDArray[np.float16]:
        """Return the array, mapped."""
        return np.memmap(self.path, np.float16, "r", shape=(self.rows, self.vocab_size))

    def write_answers(self, answers: Sequence[Sequence[int]]) -> None:
        """Keep the greedy answers."""
        replace_text(self._answers, json.dumps([list(each) for each in answers]))

    def read_answers(self, count: int) -> list[list[int]] | None:
        """Return the greedy answers; None when there are not ``count`` of them."""
        try:
            found = json.loads(self._answers.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(found, list) or len(found) != count or not all(map(_are_tokens, found)):
            return None
        return found


def reference_file(
    folder: Path,
    checkpoint: Checkpoint,
    windows: Sequence[Window],
    *,
    vocab_size: int,
    settings: Sequence[object],
) -> ReferenceFile:
    """Return the file for ``checkpoint`` on ``windows``; its name depends on both.

    Args:
        folder: where it is, or will be.
        checkpoint: the reference.
        windows: the texts.
        vocab_size: V.
        settings: what else the numbers depend on, e.g. the device.
    """
    digests = sample_files([*checkpoint.weight_files, checkpoint.path / "config.json"])
    parts = [__version__, digests, texts_digest(windows), [str(each) for each in settings]]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
    rows = sum(window.count for window in windows)
    return ReferenceFile(folder / f"{key}{SUFFIX}", rows, vocab_size)


def as_stored(logits: Tensor) -> NDArray[np.float16]:
    """Return the log-probabilities of ``logits`` [R, V] as the file holds them."""
    return logits.float().log_softmax(-1).to("cpu", torch.float16).numpy()


def from_stored(rows: NDArray[np.float16], path: Path) -> Tensor:
    """Return log-probabilities [R, V], normalized again after their rounding to float16.

    Raises: ResourceError, when ``rows`` of the file ``path`` are something else.
    """
    stored = torch.from_numpy(np.array(rows, np.float32))
    total = stored.logsumexp(-1, keepdim=True)
    if not bool((total.abs() < MAX_ERROR).all()):  # not-a-number included
        raise ResourceError(
            "E_DAMAGED_CACHE",
            f"{path} does not hold log-probabilities",
            hint="remove it: the reference then runs again",
        )
    return stored - total


def _are_tokens(value: object) -> bool:
    return isinstance(value, list) and all(type(token) is int for token in value)
