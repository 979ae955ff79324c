"""The rate of generated tokens follows what happens now."""

from __future__ import annotations

import pytest

from qtool.engine import throughput
from qtool.engine.throughput import Throughput


def test_the_rate_is_that_of_the_last_interval_and_0_when_idle(monkeypatch):
    now = 100.0
    monkeypatch.setattr(throughput.time, "monotonic", lambda: now)
    meter = Throughput()
    for _ in range(25):
        now += 0.1
        meter.note(3)
    assert meter.tokens_per_s == pytest.approx(30)
    now += 4
    assert meter.tokens_per_s == pytest.approx(30)
    now += 2
    assert meter.tokens_per_s == 0
    for _ in range(12):
        now += 0.1
        meter.note(1)
    assert meter.tokens_per_s == pytest.approx(10, rel=0.2)
