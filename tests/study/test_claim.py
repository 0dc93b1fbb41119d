"""Claims: one holder at a time, a dead one is known."""

from __future__ import annotations

import json
import multiprocessing
import os
import time

import pytest

from qtorch.study import claim
from qtorch.study.claim import claimed, claims_folder, is_held

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
