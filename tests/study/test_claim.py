"""Claims: one holder at a time, a dead one is known."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time

import pytest

from qtorch.study import claim
from qtorch.study.claim import claimed, claims_folder, is_held
from qtorch.tracking.locations import file_lock

context = multiprocessing.get_context("fork")


def in_a_child(work, *arguments):
    child = context.Process(target=work, args=arguments)
    child.start()
    return child


def hold(path, ready, end):
    with claimed(path) as mine:
        ready.put(mine)
        end.get()


@pytest.fixture
def holder(tmp_path):
    """`(path, child, end)`: a process that holds the claim."""
    ready, end = context.SimpleQueue(), context.SimpleQueue()
    child = in_a_child(hold, tmp_path / "job.json", ready, end)
    assert ready.get() is True
    yield tmp_path / "job.json", child, end
    child.kill()
    child.join()


def test_a_second_process_does_not_get_the_claim_until_it_is_given_back(holder):
    path, child, end = holder
    assert is_held(path)
    with claimed(path) as mine:
        assert mine is False
    assert is_held(path)
    end.put(None)
    child.join()
    assert not path.exists()
    with claimed(path) as mine:
        assert mine is True


def test_a_dead_holder_of_this_machine_is_known_at_once(holder):
    path, child, _ = holder
    child.kill()
    child.join()
    assert path.exists()
    assert not is_held(path)
    with claimed(path) as mine:
        assert mine is True


def test_one_with_the_process_id_of_a_dead_holder_is_another(tmp_path):
    path = tmp_path / "job.json"
    held = {"token": "x", "machine": claim._machine(), "process": [os.getpid(), "1"]}
    path.write_text(json.dumps(held))
    assert not is_held(path)


def test_a_holder_elsewhere_is_judged_by_its_last_touch(tmp_path):
    path = tmp_path / "job.json"
    path.write_text(json.dumps({"token": "x", "machine": "another", "process": [1, "1"]}))
    assert is_held(path)
    old = time.time() - claim.STALE_SECONDS - 5
    os.utime(path, (old, old))
    assert not is_held(path)


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """The claim of another machine, touched a moment ago; it counts for a second."""
    monkeypatch.setattr(claim, "STALE_SECONDS", 1.0)
    monkeypatch.setattr(claim, "LOOK_SECONDS", 0.02)
    path = tmp_path / "job.json"
    path.write_text(json.dumps({"token": "x", "machine": "another 1", "process": [1, "1"]}))
    return path


def touch_until(path, done):
    while not done.wait(0.1):
        os.utime(path)


def later(seconds, work, *arguments):
    timer = threading.Timer(seconds, work, arguments)
    timer.start()
    return timer


def test_a_dead_holder_elsewhere_is_outlived(foreign, caplog):
    caplog.set_level("INFO")
    free = []

    def try_the_lock():
        with file_lock(foreign.with_name(f".{foreign.name}.lock"), timeout=0.2):
            free.append(True)

    timer = later(0.3, try_the_lock)
    begin = time.monotonic()
    with claimed(foreign) as mine:
        assert mine is True
        assert json.loads(foreign.read_text())["machine"] == claim._machine()
    assert 0.8 < time.monotonic() - begin < 3
    timer.join()
    assert free
    assert "another has claimed this job" in caplog.text


def test_a_holder_elsewhere_that_touches_its_claim_keeps_it(foreign):
    done = threading.Event()
    holder = threading.Thread(target=touch_until, args=(foreign, done))
    holder.start()
    with claimed(foreign) as mine:
        assert mine is False
    done.set()
    holder.join()
    assert json.loads(foreign.read_text())["machine"] == "another 1"


def test_a_claim_given_back_elsewhere_is_taken_at_once(foreign, monkeypatch):
    monkeypatch.setattr(claim, "STALE_SECONDS", 30.0)
    later(0.1, foreign.unlink)
    with claimed(foreign) as mine:
        assert mine is True


def test_of_those_who_outlive_a_holder_one_gets_its_job(foreign):
    begin, end, taken = context.Barrier(2), context.Barrier(2), context.SimpleQueue()
    children = [in_a_child(race, foreign, begin, taken, end) for _ in range(2)]
    for child in children:
        child.join()
    assert sorted(taken.get() for _ in children) == [False, True]


def test_an_interruption_ends_the_look_at_a_claim(foreign, monkeypatch):
    monkeypatch.setattr(claim, "STALE_SECONDS", 30.0)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` ignores it
    try:
        later(0.1, os.kill, os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt), claimed(foreign):
            pass
    finally:
        signal.signal(signal.SIGINT, before)
    assert json.loads(foreign.read_text())["machine"] == "another 1"


def test_a_claim_is_touched_while_it_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(claim, "BEAT_SECONDS", 0.02)
    path = tmp_path / "job.json"
    with claimed(path):
        os.utime(path, (1, 1))
        end = time.monotonic() + 5
        while path.stat().st_mtime == 1 and time.monotonic() < end:
            time.sleep(0.02)
        assert path.stat().st_mtime > 1


def late(path):
    claim.BEAT_SECONDS = 0.1
    with claimed(path):
        path.write_text(json.dumps({"token": "of another", "machine": "m", "process": [1, "1"]}))
        time.sleep(5)


def test_a_holder_whose_job_was_taken_meanwhile_ends(tmp_path):
    path = tmp_path / "job.json"
    child = in_a_child(late, path)
    child.join(5)
    assert child.exitcode == claim.LOST
    assert json.loads(path.read_text())["token"] == "of another"


def race(path, begin, taken, end):
    begin.wait()
    with claimed(path) as mine:
        taken.put(mine)
        end.wait()


def test_of_many_at_once_one_gets_it(tmp_path):
    begin, end, taken = context.Barrier(8), context.Barrier(8), context.SimpleQueue()
    children = [in_a_child(race, tmp_path / "a.json", begin, taken, end) for _ in range(8)]
    for child in children:
        child.join()
    assert sorted(taken.get() for _ in children) == [False] * 7 + [True]


def test_claims_lie_beside_a_local_store(tmp_path, monkeypatch):
    assert claims_folder(f"sqlite:///{tmp_path}/mlruns/m.db") == tmp_path / "mlruns" / "claims"
    monkeypatch.setenv("QTORCH_CACHE", str(tmp_path / "cache"))
    served = claims_folder("http://localhost:5000")
    assert served.parent == tmp_path / "cache" / "claims"
    assert served != claims_folder("http://localhost:5001")
