"""A worker's events on stderr: one bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

from qtool.events import Event, NoteEvent, OnEvent, ProgressEvent, StageEvent, ignore_event

PLAIN_INTERVAL_S = 10.0


@contextlib.contextmanager
def progress(*, quiet: bool, verbose: bool = False) -> Iterator[OnEvent]:
    """Give a function that shows events: nothing if ``quiet``, every one on a line if
    ``verbose``.
    """
    if quiet:
        yield ignore_event
    elif verbose:
        yield _Lines(interval_s=0.0).show
    elif sys.stderr.isatty():
        with _bar() as show:
            yield show
    else:
        yield _Lines().show


@contextlib.contextmanager
def _bar() -> Iterator[OnEvent]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def show(event: Event) -> None:
            nonlocal task
            if isinstance(event, StageEvent):
                bar.remove_task(task)  # a task that had a total keeps it
                task = bar.add_task(event.what, total=None)
            elif isinstance(event, NoteEvent):
                bar.print(f"note: {event.text}")
            elif isinstance(event, ProgressEvent):
                bar.update(task, description=event.what, completed=event.done, total=event.total)

        yield show


class _Lines:
    def __init__(self, *, interval_s: float = PLAIN_INTERVAL_S) -> None:
        self._interval_s = interval_s
        self._start = time.monotonic()
        self._last = 0.0

    def show(self, event: Event) -> None:
        now = time.monotonic() - self._start
        if isinstance(event, StageEvent):
            print(f"[{now:6.1f} s] {event.what}", file=sys.stderr, flush=True)
        elif isinstance(event, NoteEvent):
            print(f"note: {event.text}", file=sys.stderr, flush=True)
        elif isinstance(event, ProgressEvent) and (
            event.done == event.total or now - self._last > self._interval_s
        ):
            self._last = now
            print(
                f"[{now:6.1f} s] {event.what}: {event.done} of {event.total}",
                file=sys.stderr,
                flush=True,
            )
