"""run_task in one process: what it does with errors, signals, lost leases and names."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pool_workers
import pytest
from pool_workers import start, until

from qtorch.core.errors import ArgumentError, ConfigError
from qtorch.core.heartbeat import beat
from qtorch.task import TaskManager, run_task
from qtorch.task.definition import decode_result, encode_result


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path / 'tasks.db'}"


def numbers(count):
    return [{"number": k} for k in range(count)]


def test_it_runs_what_there_is(manager, url):
    assert run_task(lambda task: task, manager.task_pool, url=url) is False
    manager.create_task(numbers(3))
    seen = []

    def work(task, factor, offset=0):
        seen.append(task)
        return task["number"] * factor + offset

    assert run_task(work, manager.task_pool, url=url, factor=2, offset=1) is True
    assert seen == numbers(3)
    assert [t["res"] for t in manager.query()] == [1, 3, 5]


def test_queries_and_limits(manager, url):
    manager.create_task(numbers(4))
    query = {"number": {"$in": [1, 2, 3]}}
    run_task(lambda task: 1, manager.task_pool, query, url=url, max_tasks=2)
    assert [t["status"] for t in manager.query()] == ["waiting", "done", "done", "waiting"]


def test_errors_count_for_their_task_and_the_others_go_on(manager, url):
    manager.create_task(numbers(3))

    def work(task):
        return 1 // (task["number"] - 1)

    run_task(work, manager.task_pool, url=url)
    assert manager.task_stat() == {"done": 2, "failed": 1}
    (failed,) = manager.query({"status": "failed"})
    assert (failed["errors"], failed["attempt"]) == (3, 3)
    assert failed["error"].startswith("ZeroDivisionError")
    assert "in work" in failed["traceback"]


def test_a_result_that_cannot_be_stored_is_an_error_of_the_task(manager, url):
    manager.create_task(numbers(1))
    run_task(lambda task: object(), manager.task_pool, url=url)
    (task,) = manager.query()
    assert task["status"] == "failed"
    assert "return the recorder" in task["error"]


def test_a_task_may_not_end_its_worker(manager, url):
    manager.create_task(numbers(2))

    def work(task):
        if task["number"] == 0:
            sys.exit(3)
        return 1

    run_task(work, manager.task_pool, url=url)
    assert [t["status"] for t in manager.query()] == ["failed", "done"]


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ({"_target_": "os.system", "command": "true"}, "TrustError.*os.system.*not trusted"),
        ({"_target_": "qtorch.nn.LTSM"}, "ConfigError.*Did you mean 'LSTM'"),
        ({"class": "X", "module_path": "/somewhere/x.py"}, "TrustError.*which is code"),
    ],
)
def test_a_definition_that_names_the_wrong_thing_fails_at_once(manager, url, model, reason):
    manager.create_task([{"model": model}, *numbers(1)])
    run_task(lambda task: task["number"], manager.task_pool, url=url)
    failed, done = manager.query()
    assert (failed["status"], failed["attempt"], done["status"]) == ("failed", 1, "done")
    import re

    assert re.search(reason, failed["error"])


def test_two_phases(manager, url):
    manager.create_task(numbers(2))
    first = {"after_status": "part_done", "idle_timeout": None}
    run_task(lambda task: task["number"] + 10, manager.task_pool, url=url, **first)
    assert manager.task_stat() == {"part_done": 2}
    run_task(lambda result: result * 2, manager.task_pool, url=url, before_status="part_done")
    assert [t["res"] for t in manager.query()] == [20, 22]
    with pytest.raises(ConfigError, match="waiting or part_done"):
        run_task(len, manager.task_pool, url=url, before_status="done")


def test_a_typo_in_the_arguments_is_named(manager, url):
    with pytest.raises(ArgumentError, match="Did you mean 'seconds'"):
        run_task(pool_workers.brief, manager.task_pool, url=url, secnods=1)


def test_by_dotted_name_until_all_are_done(manager, url, tmp_path):
    """A second worker with `idle_timeout=None` waits for what the first holds."""
    manager.create_task(numbers(2))
    held = manager.fetch_task()
    threading.Timer(0.5, lambda: manager.return_task(held)).start()
    name, journal = "pool_workers.brief", str(tmp_path / "journal")
    run_task(name, manager.task_pool, url=url, idle_timeout=None, journal=journal)
    assert manager.task_stat() == {"done": 2}


def test_the_run_of_an_earlier_attempt_and_the_signs_of_life(manager, url):
    manager.create_task(numbers(1))
    runs = []

    def work(task, run=None):
        runs.append(run)
        if run is None:
            beat("epoch", epoch=1, loss=0.5)
            beat("run", experiment_id="3", recorder_id="abc")
            until(lambda: manager.re_query("1")["run"])  # told at once, not at the next renewal
            assert manager.re_query("1")["progress"] == {"stage": "epoch", "epoch": 1, "loss": 0.5}
            raise OSError("a disk went away")
        return "resumed"

    run_task(work, manager.task_pool, url=url)
    kept = {"experiment_id": "3", "recorder_id": "abc", "tracking_uri": None}
    assert runs == [None, kept]
    assert manager.re_query("1")["res"] == "resumed"


def test_a_lost_lease_stops_the_work(manager, url):
    """A reset takes the task away: the work is interrupted, nothing is committed, and the loop
    goes on (here with the same task)."""
    manager.create_task(numbers(1))
    ends = []
    handler = signal.getsignal(signal.SIGINT)

    def work(task):
        if ends:
            return "second"
        manager.reset_waiting()
        try:
            time.sleep(20)
        except KeyboardInterrupt:
            ends.append(1)
            raise
        return "first"

    begin = time.monotonic()
    run_task(work, manager.task_pool, url=url, lease=1.2)
    assert time.monotonic() - begin < 5
    (task,) = manager.query()
    assert (task["res"], task["attempt"], task["preemptions"]) == ("second", 2, 0)
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.slow
def test_a_function_that_hangs_does_not_keep_its_task(manager, url, monkeypatch):
    """It is interrupted, as its error; one that gives signs of life goes on for longer."""
    monkeypatch.setattr("qtorch.core.heartbeat.PAUSE_SECONDS", 0.02)
    manager.create_task(numbers(2))
    hung = []

    def work(task):
        if task["number"] == 0 and not hung:
            hung.append(1)
            threading.Event().wait(20)
        for _ in range(task["number"] * 40):
            beat("training")
            time.sleep(0.02)
        return task["number"]

    run_task(work, manager.task_pool, url=url, hang_after=0.6)
    first, second = manager.query()
    assert [(t["res"], t["attempt"], t["errors"]) for t in (first, second)] == [
        (0, 2, 1),
        (1, 1, 0),
    ]
    with pytest.raises(ConfigError, match="hang_after is a number of seconds above 0"):
        run_task(work, manager.task_pool, url=url, hang_after=0)


def test_what_hangs_says_where_and_fails_in_the_end(manager, url):
    manager.create_task(numbers(1))

    def work(task):
        threading.Event().wait(20)

    run_task(work, manager.task_pool, url=url, hang_after=0.1)
    (task,) = manager.query()
    assert (task["status"], task["errors"], task["lost"]) == ("failed", 3, 0)
    assert task["error"] == "no sign of life for 0.1 s (hang_after)"
    assert "in work" in task["traceback"]


def test_a_hung_function_that_nothing_interrupts_loses_its_lease(manager, url):
    """In a thread no signal reaches it: the lease runs out, and its commit is refused."""
    manager.create_task(numbers(1))
    go = threading.Event()
    given = {"url": url, "hang_after": 0.2, "lease": 0.4}
    thread = threading.Thread(
        target=run_task, args=(lambda task: go.wait(20), manager.task_pool), kwargs=given
    )
    thread.start()
    until(lambda: manager.task_stat() == {"running": 1})
    until(lambda: manager.fetch_task())
    (task,) = manager.query()
    assert (task["attempt"], task["lost"]) == (2, 1)
    go.set()
    thread.join(10)
    (task,) = manager.query()
    assert (task["status"], task["attempt"]) == ("running", 2)


def test_in_a_thread(manager, url):
    manager.create_task(numbers(3))
    given = {"target": run_task, "args": (lambda task: 1, manager.task_pool)}
    thread = threading.Thread(**given, kwargs={"url": url})
    thread.start()
    thread.join(10)
    assert manager.task_stat() == {"done": 3}


STOPPABLE = """
import sys, time
from pool_workers import note
from qtorch.task import run_task

def work(task, journal, stubborn):
    note(journal, "begin")
    try:
        time.sleep(30)
    finally:
        note(journal, "kept")
        if stubborn:
            time.sleep(30)

pool, url, journal, stubborn = sys.argv[1:]
run_task(work, pool, url=url, journal=journal, stubborn=stubborn == "1")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_gives_the_task_back(manager, url, tmp_path, number):
    manager.create_task(numbers(2))
    journal = tmp_path / "journal"
    process = start(STOPPABLE, manager.task_pool, url, str(journal), "0")
    until(lambda: journal.exists())
    process.send_signal(number)
    code = process.wait(10)
    assert code == (143 if number == signal.SIGTERM else -signal.SIGINT)
    assert journal.read_text() == "begin\nkept\n"
    first, second = manager.query()
    assert (first["status"], first["preemptions"], first["errors"]) == ("waiting", 1, 0)
    assert second["attempt"] == 0


def test_a_second_signal_ends_at_once(manager, url, tmp_path):
    manager.create_task(numbers(1))
    journal = tmp_path / "journal"
    process = start(STOPPABLE, manager.task_pool, url, str(journal), "1")
    until(lambda: journal.exists())
    process.send_signal(signal.SIGINT)
    until(lambda: "kept" in journal.read_text())
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(10) != 0
    assert time.monotonic() - begin < 3


@pytest.mark.slow
def test_a_process_for_each_task(manager, url, tmp_path, monkeypatch):
    """force_release: other processes, their errors and their deaths are told."""
    monkeypatch.setenv("QTORCH_TRUSTED", "pool_workers")
    journal = str(tmp_path / "journal")
    manager.create_task([{"number": 1}, {"number": 2, "what": "kill"}])
    run_task(pool_workers.told_pid, manager.task_pool, force_release=True, url=url, journal=journal)
    done, failed = manager.query()
    assert done["res"]["pid"] != os.getpid()
    assert (failed["status"], failed["errors"]) == ("failed", 3)
    assert "was ended by SIGKILL" in failed["error"]


@pytest.mark.slow
def test_a_process_that_hangs_is_ended(manager, url, tmp_path, monkeypatch):
    """At once, without the time for a checkpoint: another worker may have the task."""
    monkeypatch.setenv("QTORCH_TRUSTED", "pool_workers")
    manager.create_task([{"number": 1, "what": "hang"}])
    given = {"journal": str(tmp_path / "journal"), "hang_after": 4.0}
    begin = time.monotonic()
    run_task(
        pool_workers.told_pid, manager.task_pool, force_release=True, url=url, max_tasks=1, **given
    )
    assert time.monotonic() - begin < 20
    (task,) = manager.query()
    assert (task["status"], task["errors"]) == ("waiting", 1)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "journal").read_text()), 0)


@pytest.mark.slow
def test_a_recorder_comes_back_as_one(manager, url, tmp_path):
    from qtorch.tracking import R

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    manager.create_task(numbers(1))

    def work(task):
        with R.uri_context(uri), R.start(experiment_name="e"):
            R.log_metrics(ic=0.1)
            return R.get_recorder()

    run_task(work, manager.task_pool, url=url)
    (task,) = manager.query()
    assert task["res"].list_metrics() == {"ic": 0.1}
    assert task["res"].uri == uri
    (plain,) = manager.query(decode=False)
    assert plain["res"]["$recorder"]["recorder_id"] == task["res"].id
    twice = decode_result(encode_result([task["res"], {"a": (1, 2)}]))
    assert twice == [task["res"], {"a": [1, 2]}]


def test_a_pool_in_use_imports_nothing_heavy(tmp_path):
    code = f"""
import sys, time
begin = time.perf_counter()
from qtorch.task import TaskManager, run_task
manager = TaskManager("p", "sqlite:///{tmp_path}/t.db")
manager.create_task([{{"model": {{"_target_": "a.B"}}}}])
task = manager.fetch_task()
manager.renew(task, progress={{"epoch": 1}})
manager.commit_task_res(task, 1)
heavy = {{"torch", "mlflow", "pandas", "numpy", "pytorch_lightning", "hydra", "pymongo", "psycopg"}}
print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_default_store_lies_beside_the_runs(tmp_path, monkeypatch):
    import qtorch

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("QTORCH_TASK_URL", raising=False)
    assert TaskManager("p").url == f"sqlite:///{tmp_path}/mlruns/tasks.db"
    monkeypatch.setenv("QTORCH_TASK_URL", "sqlite:///e.db")
    assert TaskManager("p").url == "sqlite:///e.db"
    qtorch.init(task_url="sqlite:///i.db")
    assert TaskManager("p").url == "sqlite:///i.db"
    assert TaskManager("p", "sqlite:///u.db").url == "sqlite:///u.db"
