"""`Stopwatch`: how long each part of a start took."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

LOG = logging.getLogger("qtool.engine")


class Stopwatch:
    """Measures the parts of a start, one after another, and logs each."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self.seconds: dict[str, float] = {}
        """How long each part took."""

    def __call__(self, part: str, what: str = "") -> None:
        """Log how long ``part``, which has just ended, took; the log names it ``what`` if given."""
        now = time.monotonic()
        self.seconds[part] = now - self._last
        LOG.info("%s in %.1f s", what or part, self.seconds[part])
        self._last = now


def breakdown(seconds: Mapping[str, float]) -> str:
    """Return the ``seconds`` of each part of a start as one line of text."""
    return ", ".join(f"{part} {taken:.1f}" for part, taken in seconds.items())
