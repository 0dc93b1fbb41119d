"""Tests of leases: only one holder of a claim at a time, dead holders are detected."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time

import pytest

from qtorch.core.files import file_lock
from qtorch.process import lease
from qtorch.process.lease import ProcessIdentity, RenewalThread, hold_claim, is_held

context = multiprocessing.get_context("fork")


def start_process(work, *arguments):
    child = context.Process(target=work, args=arguments)
    child.start()
    return child


def hold_in_process(path, ready, end):
    with hold_claim(path) as has_claim:
        ready.put(has_claim)
        end.get()


@pytest.fixture
def holder(tmp_path):
    """`(path, child, end)` of a process that holds the claim until something is put into `end`."""
    ready, end = context.SimpleQueue(), context.SimpleQueue()
    child = start_process(hold_in_process, tmp_path / "job.json", ready, end)
    assert ready.get() is True
    yield tmp_path / "job.json", child, end
    child.kill()
    child.join()


def test_second_process_gets_claim_only_after_release(holder):
    path, child, end = holder
    assert is_held(path)
    with hold_claim(path) as has_claim:
        assert has_claim is False
    assert is_held(path)
    end.put(None)
    child.join()
    assert not path.exists()
    with hold_claim(path) as has_claim:
        assert has_claim is True


def test_dead_holder_on_same_machine_is_detected_at_once(holder):
    path, child, _ = holder
    child.kill()
    child.join()
    assert path.exists()
    assert not is_held(path)
    with hold_claim(path) as has_claim:
        assert has_claim is True


def test_suspended_holder_is_judged_by_its_last_touch(holder, monkeypatch):
    path, child, end = holder
    monkeypatch.setattr(lease, "POLL_SECONDS", 0.02)
    os.kill(child.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
    assert is_held(path)
    monkeypatch.setattr(lease, "STALE_SECONDS", 0.3)
    with hold_claim(path) as has_claim:
        assert has_claim is True
        os.kill(child.pid, signal.SIGCONT)
        end.put(None)
        child.join(10)
        assert json.loads(path.read_text())["process"][0] == os.getpid()


def hold_for_long(path, ready):
    lease.HEARTBEAT_SECONDS, lease.STALE_SECONDS = 0.02, 0.1
    with hold_claim(path):
        ready.put(True)
        time.sleep(30)


def test_holder_exits_if_its_job_may_have_been_finished_while_it_was_suspended(tmp_path):
    """Another process has taken over the claim, has finished the job and released the claim."""
    path, ready = tmp_path / "job.json", context.SimpleQueue()
    child = start_process(hold_for_long, path, ready)
    assert ready.get()
    os.kill(child.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
    path.unlink()
    time.sleep(0.2)
    os.kill(child.pid, signal.SIGCONT)
    child.join(10)
    assert child.exitcode == lease.LOST_CLAIM_EXIT_CODE
    assert not path.exists()


@pytest.mark.parametrize("text", ["", "[]", "1", '{"token": 1}', '{"machine": "m", "process": 1}'])
def test_file_that_is_no_claim_is_replaced(tmp_path, text):
    path = tmp_path / "job.json"
    path.write_text(text)
    assert not is_held(path)
    assert lease.describe_holder(path) == "another process"
    with hold_claim(path) as has_claim:
        assert has_claim is True
        assert f"process {os.getpid()} on {lease.socket.gethostname()} (since 2" in (
            lease.describe_holder(path)
        )


def test_reused_process_id_does_not_hold_claim(tmp_path):
    path = tmp_path / "job.json"
    token = {"token": "x", "machine": lease.machine_id(), "process": [os.getpid(), "1"]}
    path.write_text(json.dumps(token))
    assert not is_held(path)


def test_remote_holder_is_judged_by_its_last_touch(tmp_path):
    path = tmp_path / "job.json"
    path.write_text(json.dumps({"token": "x", "machine": "another", "process": [1, "1"]}))
    assert is_held(path)
    old = time.time() - lease.STALE_SECONDS - 5
    os.utime(path, (old, old))
    assert not is_held(path)


@pytest.fixture
def remote_claim(tmp_path, monkeypatch):
    """A claim of another machine that was touched just now and becomes stale after a second."""
    monkeypatch.setattr(lease, "STALE_SECONDS", 1.0)
    monkeypatch.setattr(lease, "POLL_SECONDS", 0.02)
    path = tmp_path / "job.json"
    path.write_text(json.dumps({"token": "x", "machine": "another 1", "process": [1, "1"]}))
    return path


def keep_touching(path, stop_event):
    while not stop_event.wait(0.1):
        os.utime(path)


def run_later(seconds, work, *arguments):
    timer = threading.Timer(seconds, work, arguments)
    timer.start()
    return timer


def test_claim_of_dead_remote_holder_is_taken_over(remote_claim, caplog):
    caplog.set_level("INFO")
    lock_attempts = []

    def try_the_lock():
        with file_lock(lease._lock_path(remote_claim), timeout=0.2):
            lock_attempts.append(True)

    timer = run_later(0.3, try_the_lock)
    start_time = time.monotonic()
    with hold_claim(remote_claim) as has_claim:
        assert has_claim is True
        assert json.loads(remote_claim.read_text())["machine"] == lease.machine_id()
    assert 0.8 < time.monotonic() - start_time < 3
    timer.join()
    assert lock_attempts
    assert "claimed by process 1 on another: waiting up to 1 s" in caplog.text


def test_remote_holder_that_touches_its_claim_keeps_it(remote_claim):
    stop_event = threading.Event()
    holder = threading.Thread(target=keep_touching, args=(remote_claim, stop_event))
    holder.start()
    with hold_claim(remote_claim) as has_claim:
        assert has_claim is False
    stop_event.set()
    holder.join()
    assert json.loads(remote_claim.read_text())["machine"] == "another 1"


def test_claim_released_by_remote_holder_is_taken_at_once(remote_claim, monkeypatch):
    monkeypatch.setattr(lease, "STALE_SECONDS", 30.0)
    run_later(0.1, remote_claim.unlink)
    with hold_claim(remote_claim) as has_claim:
        assert has_claim is True


def test_only_one_process_takes_over_a_stale_claim(remote_claim):
    begin, end, results = context.Barrier(2), context.Barrier(2), context.SimpleQueue()
    children = [start_process(race_for_claim, remote_claim, begin, results, end) for _ in range(2)]
    for child in children:
        child.join()
    assert sorted(results.get() for _ in children) == [False, True]


def test_interrupt_stops_waiting_for_claim(remote_claim, monkeypatch):
    monkeypatch.setattr(lease, "STALE_SECONDS", 30.0)
    # A process that was started with a shell's `&` ignores SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run_later(0.1, os.kill, os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt), hold_claim(remote_claim):
            pass
    finally:
        signal.signal(signal.SIGINT, before)
    assert json.loads(remote_claim.read_text())["machine"] == "another 1"


def test_claim_is_touched_while_it_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.02)
    path = tmp_path / "job.json"
    with hold_claim(path):
        os.utime(path, (1, 1))
        end = time.monotonic() + 5
        while path.stat().st_mtime == 1 and time.monotonic() < end:
            time.sleep(0.02)
        assert path.stat().st_mtime > 1


def hold_and_lose_claim(path):
    lease.HEARTBEAT_SECONDS = 0.1
    with hold_claim(path):
        path.write_text(json.dumps({"token": "of another", "machine": "m", "process": [1, "1"]}))
        time.sleep(5)


def test_holder_exits_after_losing_its_claim(tmp_path):
    path = tmp_path / "job.json"
    child = start_process(hold_and_lose_claim, path)
    child.join(5)
    assert child.exitcode == lease.LOST_CLAIM_EXIT_CODE
    assert json.loads(path.read_text())["token"] == "of another"


def race_for_claim(path, begin, results, end):
    begin.wait()
    with hold_claim(path) as has_claim:
        results.put(has_claim)
        end.wait()


def test_only_one_of_many_processes_gets_the_claim(tmp_path):
    begin, end, results = context.Barrier(8), context.Barrier(8), context.SimpleQueue()
    children = [
        start_process(race_for_claim, tmp_path / "a.json", begin, results, end) for _ in range(8)
    ]
    for child in children:
        child.join()
    assert sorted(results.get() for _ in children) == [False] * 7 + [True]


def test_process_identity_survives_a_change_of_the_clock(monkeypatch):
    """psutil computes the time at which a process started from that of the boot."""
    import psutil

    identity = ProcessIdentity.current()
    boot_time = psutil.boot_time()
    monkeypatch.setattr(psutil, "boot_time", lambda: boot_time + 3600)
    monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: boot_time + 3600)
    assert identity.is_alive() is True


def test_process_identity_of_dead_reused_and_remote_processes():
    child = context.Process(target=time.sleep, args=(60,))
    child.start()
    start = lease._start_ticks(child.pid)
    identity = ProcessIdentity(lease.machine_id(), child.pid, start)
    assert identity.is_alive() is True
    assert ProcessIdentity(identity.machine, child.pid, "1").is_alive() is False
    assert ProcessIdentity("another", child.pid, start).is_alive() is None
    os.kill(child.pid, signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie now
    assert identity.is_alive() is False
    child.join()
    assert identity.is_alive() is False


def test_renewals_continue_after_an_error_and_end_when_the_lease_is_lost(caplog):
    calls, end_event = [], threading.Event()

    def renew():
        calls.append(True)
        if len(calls) == 1:
            raise OSError("disk full")
        if len(calls) == 3:
            end_event.set()
        return len(calls) < 3

    with RenewalThread(renew, 0.01, "lease of x"):
        assert end_event.wait(5)
        time.sleep(0.1)
    assert len(calls) == 3
    assert "could not renew the lease of x: disk full" in caplog.text
