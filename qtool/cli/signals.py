"""Signals that end a command: each raises `Interrupted`, so that nothing half-written stays."""

from __future__ import annotations

import signal
import time
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ONE_REQUEST_S = 1.0  # signals within this time are one request, e.g. to a process and its group


class Interrupted(SystemExit):
    """A signal asked the command to end; the exit code is 128 and its number, as in shells."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number
        self.name = signal.Signals(number).name


class _Handler:
    def __init__(self) -> None:
        self._last = -ONE_REQUEST_S
        self.number: int | None = None
        """The last signal that arrived."""

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        self.number = number
        if now - self._last >= ONE_REQUEST_S:
            self._last = now
            raise Interrupted(number)


_handler = _Handler()


def catch_signals() -> None:
    """Raise `Interrupted` at each signal that asks to end. What is ignored, e.g. by `nohup`, stays
    ignored.
    """
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _handler)


def check_interrupted() -> None:
    """Raise `Interrupted` again after a signal: some libraries swallow it during their import."""
    if _handler.number is not None:
        raise Interrupted(_handler.number)


def ignore_signals() -> None:
    """Ignore all ending signals: what is left must not be interrupted."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
