"""Signs of life."""

from __future__ import annotations

import pytest

from qtorch.core import heartbeat
from qtorch.core.heartbeat import RUN, beat, is_heard, listening


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is moved."""
    now = [100.0]
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now[0])
    return now


def test_nobody_listens():
    assert not is_heard()
    beat("training", epoch=1)


def test_two_a_second_and_no_detail_is_lost(clock):
    told = []
    with listening(lambda stage, details: told.append((stage, details))):
        assert is_heard()
        beat("data")
        for epoch in range(5):
            clock[0] += 0.125
            beat("training", epoch=epoch, **({"metrics": 1} if epoch == 2 else {}))
        beat("record", record="X")
        clock[0] += 0.5
        beat("saving")
    assert told == [
        ("data", {}),
        ("training", {"epoch": 3, "metrics": 1}),
        ("saving", {"epoch": 4, "record": "X"}),
    ]
    beat("after")
    assert len(told) == 3


def test_a_run_is_told_at_once(clock):
    told = []
    with listening(lambda stage, details: told.append((stage, details))):
        beat("data")
        beat("training", epoch=1)
        beat(RUN, recorder_id="a")
        beat(RUN, recorder_id="b")
    assert told == [("data", {}), ("run", {"recorder_id": "a"}), ("run", {"recorder_id": "b"})]


def test_several_listeners_and_an_error_that_stops_the_work(clock):
    told = []

    def stop(stage, details):
        raise RuntimeError("stop")

    with (
        listening(lambda stage, details: told.append(stage)),
        listening(stop),
        pytest.raises(RuntimeError, match="stop"),
    ):
        beat("training")
    assert told == ["training"]
    assert not is_heard()
