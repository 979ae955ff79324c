"""What a run reports while it works, and how that crosses the pipe from a worker: one JSON object
a line.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar


@dataclass(frozen=True)
class StageEvent:
    """A new part of the work begins."""

    name: ClassVar[str] = "stage"
    what: str
    """E.g. ``loading the model``."""


@dataclass(frozen=True)
class ProgressEvent:
    """Some units of the work are finished."""

    name: ClassVar[str] = "progress"
    what: str
    """What is counted, e.g. ``layers``."""
    done: int
    """How many are finished."""
    total: int
    """How many there are."""


@dataclass(frozen=True)
class NoteEvent:
    """Something that the user should know, which does not stop the run."""

    name: ClassVar[str] = "note"
    text: str
    """One sentence, without a full stop."""


@dataclass(frozen=True)
class CalibrationEvent:
    """The calibration data is read and tokenized."""

    name: ClassVar[str] = "calibration"
    report: Mapping[str, str | int]
    """The fields of a `CalibrationReport`."""


@dataclass(frozen=True)
class ExpertTokensEvent:
    """Calibration data has run through all layers of a model with experts."""

    name: ClassVar[str] = "expert_tokens"
    counts: Mapping[str, Sequence[int]]
    """The module that holds the experts of a layer -> tokens that its router sent to each."""


@dataclass(frozen=True)
class StateSavedEvent:
    """The folder of the calibrated state is complete and may be published."""

    name: ClassVar[str] = "state_saved"


@dataclass(frozen=True)
class PublishedEvent:
    """An output folder is complete and in its place; later failures do not change it."""

    name: ClassVar[str] = "published"
    path: str


@dataclass(frozen=True)
class DoneEvent:
    """The worker has written the checkpoint; it sends nothing more."""

    name: ClassVar[str] = "done"
    versions: Mapping[str, str]
    """Versions by library, and of Python."""


@dataclass(frozen=True)
class ErrorEvent:
    """The worker has failed; it sends nothing more."""

    name: ClassVar[str] = "error"
    error: Mapping[str, object]
    """What `qtool.errors.to_wire` made of the error."""


Event = (
    StageEvent
    | ProgressEvent
    | NoteEvent
    | CalibrationEvent
    | ExpertTokensEvent
    | StateSavedEvent
    | PublishedEvent
    | DoneEvent
    | ErrorEvent
)
OnEvent = Callable[[Event], None]
EVENT_TYPES: Mapping[str, type[Event]] = {
    event_type.name: event_type
    for event_type in (
        StageEvent,
        ProgressEvent,
        NoteEvent,
        CalibrationEvent,
        ExpertTokensEvent,
        StateSavedEvent,
        PublishedEvent,
        DoneEvent,
        ErrorEvent,
    )
}


def ignore_event(event: Event) -> None:
    """Do nothing: the default for ``on_event``."""


def to_line(event: Event) -> str:
    """Return ``event`` as a line of JSON, its name in the key ``event``."""
    return json.dumps({"event": event.name, **asdict(event)}) + "\n"


def from_line(line: bytes) -> Event:
    """Return the event that `to_line` wrote."""
    fields = json.loads(line)
    return EVENT_TYPES[fields.pop("event")](**fields)
