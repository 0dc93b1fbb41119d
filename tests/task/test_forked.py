"""Children of the zygote: what they inherit, what they leave, how they end."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from qtorch.task.forked import Ended, ForkError, Forks, call_at

HERE = Path(__file__).parent
pytestmark = pytest.mark.slow  # the zygote's imports


@pytest.fixture(autouse=True)
def steps_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))


def test_a_child_is_where_and_what_its_caller_is(zygote, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FORK_TEST", "mine")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    told = []
    ended = zygote.call("fork_steps.describe", {"a": 1}, told.append)
    assert ended == Ended(3)
    assert told == [
        {
            "given": {"a": 1},
            "folder": str(tmp_path),
            "variable": "mine",
            "argv": sys.argv,
            "threads": 2,
            "group": True,
        }
    ]
    assert "said by the child" in capfd.readouterr().out


def test_memory_of_one_child_does_not_reach_the_next(zygote):
    told = []
    for value in (1, 2):
        assert zygote.call("fork_steps.remember", {"value": value}, told.append) == Ended(0)
    assert told == [{"before": None}, {"before": None}]


def test_a_killed_child_is_told_of_and_the_next_one_works(zygote):
    told = []
    ended = zygote.call("fork_steps.die", {}, told.append)
    assert ended.code == -signal.SIGKILL
    assert ended.how == "was ended by SIGKILL"
    assert told == [{"run": "begun"}]
    assert zygote.call("fork_steps.remember", {"value": 0}).code == 0


def test_what_cannot_be_imported_is_left_out(monkeypatch, tmp_path):
    """A part that is not installed, one that fails; a notebook's way to draw is nobody else's."""
    (tmp_path / "failing_part.py").write_text("raise ValueError")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("MPLBACKEND", "module://of_a_notebook")
    forks = Forks("no_such_part", "failing_part", "matplotlib")
    told: list = []
    assert forks.call("fork_steps.name_backend", {}, told.append) == Ended(0)
    assert told == [{"backend": "agg"}]
    forks.close()


def test_one_child_is_killed_and_the_other_works_on(zygote):
    forks = [zygote.fork("fork_steps.wait_for_stop", {}) for _ in range(2)]
    told = [fork.receive(10.0) or fork.receive(10.0) for fork in forks]
    assert [t[0]["waiting"] for t in told] == [fork.pid for fork in forks]
    zygote.kill(forks[0])
    assert forks[0].ended == Ended(-signal.SIGKILL)
    with pytest.raises(ProcessLookupError):
        os.kill(forks[0].pid, 0)
    assert forks[1].receive(0.0) == []
    os.kill(forks[1].pid, signal.SIGTERM)
    while forks[1].ended is None:
        forks[1].receive(10.0)
    assert forks[1].ended == Ended(0)


def test_what_is_killed_before_it_was_begun_never_begins(tmp_path):
    forks = Forks("torch")  # for seconds the zygote is at its imports
    fork = forks.fork("fork_steps.leave", {"path": str(tmp_path / "begun")})
    forks.kill(fork)
    assert forks.call("fork_steps.leave", {"path": str(tmp_path / "next")}) == Ended(0)
    assert [p.name for p in tmp_path.iterdir()] == ["next"]
    forks.close()


def test_an_error_of_the_work_is_an_exit_code(zygote, capfd):
    assert zygote.call("fork_steps.nothing_of_that_name", {}).code == 1
    assert "nothing_of_that_name" in capfd.readouterr().err


def test_a_stop_reaches_every_child_once_and_nothing_begins_after_it():
    forks = Forks("torch")
    told: dict[int, list] = {0: [], 1: []}
    ends: dict[int, Ended] = {}

    def call(k: int) -> None:
        ends[k] = call_at(forks.address, "fork_steps.wait_for_stop", {}, told[k].append)

    threads = [threading.Thread(target=call, args=(k,)) for k in told]
    for thread in threads:
        thread.start()
    while not all(told.values()):
        threads[0].join(0.05)
    os.kill(told[0][0]["waiting"], signal.SIGTERM)  # a scheduler signals every process too
    forks.stop(signal.SIGTERM)
    forks.stop(signal.SIGTERM)
    for thread in threads:
        thread.join()
    assert [t[1] for t in told.values()] == [{"stops": 1, "thread": True}] * 2
    assert list(ends.values()) == [Ended(0)] * 2
    assert forks.call("fork_steps.describe", {}) == Ended(None, refused=True)
    forks.close()
    with pytest.raises(ForkError, match=r"sweep.isolate=false"):
        call_at(forks.address, "fork_steps.describe", {})
