"""The wall clock is set while tasks of a SQLite pool are running."""

from __future__ import annotations

import sqlite3
import time

import pytest

from qtorch.task import TaskManager
from qtorch.task.stores import sql

HOUR = 3600.0


@pytest.fixture
def clock(monkeypatch):
    """Return `clock(seconds)`, which sets the wall clock by that; and `clock.sleep(seconds)`."""
    offsets = {"wall": 0.0, "both": 0.0}
    real_time, real_monotonic = time.time, time.monotonic
    monkeypatch.setattr(time, "time", lambda: real_time() + offsets["wall"] + offsets["both"])
    monkeypatch.setattr(time, "monotonic", lambda: real_monotonic() + offsets["both"])

    def set_wall(seconds):
        offsets["wall"] += seconds

    def sleep(seconds):
        offsets["both"] += seconds

    set_wall.sleep = sleep
    return set_wall


@pytest.fixture
def make_manager(tmp_path):
    managers = []

    def make(**options):
        managers.append(TaskManager("pool", f"sqlite:///{tmp_path}/tasks.db", **options))
        return managers[-1]

    yield make
    for manager in managers:
        manager.close()


@pytest.mark.parametrize("jump", [5 * HOUR, -5 * HOUR, 1e6 * HOUR, -1e5 * HOUR])
def test_lease_lasts_its_time_although_the_clock_is_set(clock, make_manager, jump):
    first, second = make_manager(lease=60), make_manager()
    first.create_task([{"number": 1}])
    task = first.fetch_task()
    clock(jump)
    third = make_manager()  # of a process that starts after the clock was set
    for manager in (second, third):
        assert manager.fetch_task() is None
    clock.sleep(50)
    first.renew(task)
    clock(-jump / 3)
    clock.sleep(50)
    assert second.fetch_task() is None
    clock.sleep(11)
    assert third.fetch_task()["lost"] == 1


def test_times_of_a_task_follow_the_wall_clock(clock, make_manager):
    manager = make_manager()
    manager.create_task([{"number": 1}])
    clock(5 * HOUR)
    task = manager.fetch_task()
    assert task["updated"] - task["created"] == pytest.approx(5 * HOUR, abs=5)
    assert task["updated"] == pytest.approx(time.time(), abs=5)


@pytest.mark.parametrize("jump", [-5 * HOUR, 0.0, 5 * HOUR])
def test_leases_of_dead_workers_end_after_a_restart_of_the_machine(
    clock, make_manager, monkeypatch, jump
):
    """The restart takes 100 s; the time since the start of the machine begins at 0 again."""
    make_manager(lease=60).create_task([{"number": 1}])
    make_manager(lease=60).fetch_task()
    clock.sleep(100)
    clock(jump)
    start = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda now=time.monotonic: now() - start)
    monkeypatch.setattr(sql, "boot_id", lambda: "the next boot")
    assert make_manager().fetch_task()["lost"] == 1


def test_machine_without_a_boot_id_uses_the_wall_clock(make_manager, monkeypatch):
    monkeypatch.setattr(sql, "boot_id", lambda: "")
    first, second = make_manager(lease=60), make_manager()
    first.create_task([{"number": 1}])
    first.fetch_task()
    assert second.fetch_task() is None


def test_processes_agree_on_the_clock(tmp_path, clock, make_manager):
    make_manager().task_stat()
    clock(HOUR)
    make_manager().task_stat()
    with sqlite3.connect(tmp_path / "tasks.db") as connection:
        ((start,),) = connection.execute("SELECT start FROM qtorch_task_clocks").fetchall()
    assert start == pytest.approx(time.time() - time.monotonic() - HOUR, abs=1)
