"""`Throughput`: how many tokens a second the engine generates now."""

from __future__ import annotations

import time

INTERVAL_S = 1.0
IDLE_S = 5.0  # without a token, after which the rate is 0


class Throughput:
    """Counts tokens, and gives their rate over the last whole interval."""

    def __init__(self) -> None:
        self._began = self._last = time.monotonic()
        self._count = 0
        self._rate = 0.0

    def note(self, tokens: int) -> None:
        """Count ``tokens`` that were generated just now."""
        now = time.monotonic()
        if now - self._last > INTERVAL_S:  # the pause does not count
            self._began = now
            self._count = 0
        self._last = now
        self._count += tokens
        if now - self._began >= INTERVAL_S:
            self._rate = self._count / (now - self._began)
            self._began = now
            self._count = 0

    @property
    def tokens_per_s(self) -> float:
        """The rate; 0 when no token came for a while."""
        return 0.0 if time.monotonic() - self._last > IDLE_S else self._rate
