"""A worker's events on stderr: one bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

from qtool.cli.output import current, message
from qtool.cli.signals import check_interrupted
from qtool.events import (
    Event,
    NoteEvent,
    OnEvent,
    ProgressEvent,
    PublishedEvent,
    StageEvent,
    ignore_event,
)
from qtool.terminal import lossy_stream, printable

PLAIN_INTERVAL_S = 10.0


@contextlib.contextmanager
def progress(*, quiet: bool, verbose: bool = False) -> Iterator[OnEvent]:
    """Give a function that shows events: nothing if ``quiet``, every one on a line if
    ``verbose``.
    """
    with _shown(quiet=quiet, verbose=verbose) as show:

        def on_event(event: Event) -> None:
            if isinstance(event, PublishedEvent):
                current().published.append(event.path)
            check_interrupted()
            show(event)

        yield on_event


@contextlib.contextmanager
def _shown(*, quiet: bool, verbose: bool) -> Iterator[OnEvent]:
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
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from qtool.cli.console import EscapingConsole

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    # the bar is made of terminal control sequences, which `sys.stderr` would escape
    console = EscapingConsole(file=lossy_stream(sys.stderr.fileno()))
    with Progress(*columns, console=console, transient=True, redirect_stderr=False) as bar:
        task = bar.add_task("starting", total=None)

        def show(event: Event) -> None:
            nonlocal task
            if isinstance(event, StageEvent):
                bar.remove_task(task)  # a task that had a total keeps it
                task = bar.add_task(printable(event.what), total=None)
            elif isinstance(event, NoteEvent):
                bar.print(f"note: {event.text}")
            elif isinstance(event, ProgressEvent):
                what = printable(event.what)
                bar.update(task, description=what, completed=event.done, total=event.total)

        yield show


class _Lines:
    def __init__(self, *, interval_s: float = PLAIN_INTERVAL_S) -> None:
        self._interval_s = interval_s
        self._start = time.monotonic()
        self._last = 0.0

    def show(self, event: Event) -> None:
        now = time.monotonic() - self._start
        if isinstance(event, StageEvent):
            message(f"[{now:6.1f} s] {event.what}")
        elif isinstance(event, NoteEvent):
            message(f"note: {event.text}")
        elif isinstance(event, ProgressEvent) and (
            event.done == event.total or now - self._last > self._interval_s
        ):
            self._last = now
            message(f"[{now:6.1f} s] {event.what}: {event.done} of {event.total}")
