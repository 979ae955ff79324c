"""Events keep their form on the pipe between a worker and its parent."""

from __future__ import annotations

import pytest

from qtool.events import (
    CalibrationEvent,
    DoneEvent,
    ErrorEvent,
    ExpertTokensEvent,
    NoteEvent,
    ProgressEvent,
    StageEvent,
    StateSavedEvent,
    from_line,
    to_line,
)

LINES = {
    '{"event": "stage", "what": "loading the model"}': StageEvent("loading the model"),
    '{"event": "progress", "what": "layers", "done": 1, "total": 2}': ProgressEvent("layers", 1, 2),
    '{"event": "note", "text": "cut"}': NoteEvent("cut"),
    '{"event": "calibration", "report": {"used": 3}}': CalibrationEvent({"used": 3}),
    '{"event": "expert_tokens", "counts": {"mlp.experts": [3, 0]}}': ExpertTokensEvent(
        {"mlp.experts": [3, 0]}
    ),
    '{"event": "state_saved"}': StateSavedEvent(),
    '{"event": "done", "versions": {"torch": "2.9"}}': DoneEvent({"torch": "2.9"}),
    '{"event": "error", "error": {"code": "E_DISK"}}': ErrorEvent({"code": "E_DISK"}),
}


@pytest.mark.parametrize("line", LINES)
def test_an_event_crosses_the_pipe_as_one_line(line):
    assert to_line(LINES[line]) == line + "\n"
    assert from_line(line.encode()) == LINES[line]
