"""`Stopwatch`: how long each part of a start took, in the log."""

from __future__ import annotations

import logging
import time

LOG = logging.getLogger("qtool.engine")


class Stopwatch:
    """Logs how long each part took."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self, what: str) -> None:
        """Log that ``what`` was done, and how long it took."""
        now = time.monotonic()
        LOG.info("%s in %.1f s", what, now - self._last)
        self._last = now
