"""Signals that end a command: each unwinds it, so that nothing half-written stays."""

from __future__ import annotations

import signal
import time
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ONE_REQUEST_S = 1.0  # a signal to a process and to its group is one request to end


class Interrupted(SystemExit):
    """A signal came; the exit code is the one that shells give it."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number
        self.name = signal.Signals(number).name


class _Handler:
    def __init__(self) -> None:
        self._last = -ONE_REQUEST_S
        self.number: int | None = None
        """The signal that came."""

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        self.number = number
        if now - self._last >= ONE_REQUEST_S:
            self._last = now
            raise Interrupted(number)


_handler = _Handler()


def catch_signals() -> None:
    """Raise `Interrupted` at each signal that asks to end; those that are ignored, as `nohup` does,
    stay ignored.
    """
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _handler)


def check_interrupted() -> None:
    """Raise `Interrupted` again: libraries catch what is raised while they are imported."""
    if _handler.number is not None:
        raise Interrupted(_handler.number)


def ignore_signals() -> None:
    """Let nothing interrupt what is left: the work has ended."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
