"""Heartbeats and their listeners."""

from __future__ import annotations

import pytest

from qtorch.process import heartbeat
from qtorch.process.heartbeat import RUN, beat, has_listeners, listen


@pytest.fixture
def clock(monkeypatch):
    """A fake monotonic clock that the test advances."""
    now = [100.0]
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now[0])
    return now


def test_beat_without_a_listener_does_nothing():
    assert not has_listeners()
    beat("training", epoch=1)


def test_beats_are_limited_to_two_per_second_and_keep_all_details(clock):
    reports = []
    with listen(lambda stage, details: reports.append((stage, details))):
        assert has_listeners()
        beat("data")
        for epoch in range(5):
            clock[0] += 0.125
            beat("training", epoch=epoch, **({"metrics": 1} if epoch == 2 else {}))
        beat("record", record="X")
        clock[0] += 0.5
        beat("saving")
    assert reports == [
        ("data", {}),
        ("training", {"epoch": 3, "metrics": 1}),
        ("saving", {"epoch": 4, "record": "X"}),
    ]
    beat("after")
    assert len(reports) == 3


def test_run_beat_is_reported_immediately(clock):
    reports = []
    with listen(lambda stage, details: reports.append((stage, details))):
        beat("data")
        beat("training", epoch=1)
        beat(RUN, recorder_id="a")
        beat(RUN, recorder_id="b")
    assert reports == [("data", {}), ("run", {"recorder_id": "a"}), ("run", {"recorder_id": "b"})]


def test_error_of_one_of_several_listeners_stops_the_work(clock):
    reports = []

    def stop(stage, details):
        raise RuntimeError("stop")

    with (
        listen(lambda stage, details: reports.append(stage)),
        listen(stop),
        pytest.raises(RuntimeError, match="stop"),
    ):
        beat("training")
    assert reports == ["training"]
    assert not has_listeners()
