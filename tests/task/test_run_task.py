"""`run_task`: errors, signals, lost leases, hanging functions and child processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pool_workers
import pytest
from pool_workers import start, wait_until

from qtorch.core.errors import ArgumentError, ConfigError
from qtorch.process.fork_server import ForkError
from qtorch.process.heartbeat import beat
from qtorch.task import TaskManager, run_task
from qtorch.task.definition import decode_result, encode_result, restore_recorders
from qtorch.task.worker_process import task_fork_server


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path / 'tasks.db'}"


def definitions(count):
    return [{"number": k} for k in range(count)]


def test_runs_all_waiting_tasks(manager, url):
    assert run_task(lambda task: task, manager.task_pool, url=url) is False
    manager.create_task(definitions(3))
    calls = []

    def work(task, factor, offset=0):
        calls.append(task)
        return task["number"] * factor + offset

    assert run_task(work, manager.task_pool, url=url, factor=2, offset=1) is True
    assert calls == definitions(3)
    assert [t["res"] for t in manager.query()] == [1, 3, 5]


def test_query_and_max_tasks_select_the_tasks(manager, url):
    manager.create_task(definitions(4))
    query = {"number": {"$in": [1, 2, 3]}}
    run_task(lambda task: 1, manager.task_pool, query, url=url, max_tasks=2)
    assert [t["status"] for t in manager.query()] == ["waiting", "done", "done", "waiting"]


def test_error_counts_for_its_task_and_the_others_run(manager, url):
    manager.create_task(definitions(3))

    def work(task):
        return 1 // (task["number"] - 1)

    run_task(work, manager.task_pool, url=url)
    assert manager.task_stat() == {"done": 2, "failed": 1}
    (failed_task,) = manager.query({"status": "failed"})
    assert (failed_task["errors"], failed_task["attempt"]) == (3, 3)
    assert failed_task["error"].startswith("ZeroDivisionError")
    assert "in work" in failed_task["traceback"]


def test_result_that_cannot_be_stored_is_an_error_of_the_task(manager, url):
    manager.create_task(definitions(1))
    run_task(lambda task: object(), manager.task_pool, url=url)
    (task,) = manager.query()
    assert task["status"] == "failed"
    assert "return the recorder" in task["error"]


def test_sys_exit_of_a_task_does_not_end_the_loop(manager, url):
    manager.create_task(definitions(2))

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
def test_definition_with_an_invalid_name_fails_without_retry(manager, url, model, reason):
    manager.create_task([{"model": model}, *definitions(1)])
    run_task(lambda task: task["number"], manager.task_pool, url=url)
    failed_task, done_task = manager.query()
    assert (failed_task["status"], failed_task["attempt"], done_task["status"]) == (
        "failed",
        1,
        "done",
    )
    import re

    assert re.search(reason, failed_task["error"])


def test_two_phases_with_part_done(manager, url):
    manager.create_task(definitions(2))
    first_phase = {"after_status": "part_done", "idle_timeout": None}
    run_task(lambda task: task["number"] + 10, manager.task_pool, url=url, **first_phase)
    assert manager.task_stat() == {"part_done": 2}
    run_task(lambda result: result * 2, manager.task_pool, url=url, before_status="part_done")
    assert [t["res"] for t in manager.query()] == [20, 22]
    with pytest.raises(ConfigError, match="waiting or part_done"):
        run_task(len, manager.task_pool, url=url, before_status="done")


def test_unknown_argument_suggests_the_nearest_name(manager, url):
    with pytest.raises(ArgumentError, match="Did you mean 'seconds'"):
        run_task(pool_workers.short_task, manager.task_pool, url=url, secnods=1)


def test_function_by_import_path_runs_until_all_tasks_are_done(manager, url, tmp_path):
    """With `idle_timeout=None` the loop waits for tasks that other workers run."""
    manager.create_task(definitions(2))
    claimed_task = manager.fetch_task()
    threading.Timer(0.5, lambda: manager.return_task(claimed_task)).start()
    name, journal = "pool_workers.short_task", str(tmp_path / "journal")
    run_task(name, manager.task_pool, url=url, idle_timeout=None, journal=journal)
    assert manager.task_stat() == {"done": 2}


def test_run_is_stored_and_passed_to_the_next_attempt(manager, url):
    manager.create_task(definitions(1))
    runs = []

    def work(task, run=None):
        runs.append(run)
        if run is None:
            beat("epoch", epoch=1, loss=0.5)
            beat("run", experiment_id="3", recorder_id="abc")
            wait_until(
                lambda: manager.re_query("1")["run"]
            )  # stored immediately, not with the next renewal
            assert manager.re_query("1")["progress"] == {"stage": "epoch", "epoch": 1, "loss": 0.5}
            raise OSError("a disk went away")
        return "resumed"

    run_task(work, manager.task_pool, url=url)
    run_ids = {"experiment_id": "3", "recorder_id": "abc", "tracking_uri": None}
    assert runs == [None, run_ids]
    assert manager.re_query("1")["res"] == "resumed"


def test_lost_lease_interrupts_the_task(manager, url):
    """After a reset the task is interrupted, nothing is committed, and the loop continues."""
    manager.create_task(definitions(1))
    interrupts = []
    handler = signal.getsignal(signal.SIGINT)

    def work(task):
        if interrupts:
            return "second"
        manager.reset_waiting()
        try:
            time.sleep(20)
        except KeyboardInterrupt:
            interrupts.append(1)
            raise
        return "first"

    begin = time.monotonic()
    run_task(work, manager.task_pool, url=url, lease=1.2)
    assert time.monotonic() - begin < 5
    (task,) = manager.query()
    assert (task["res"], task["attempt"], task["preemptions"]) == ("second", 2, 0)
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.slow
def test_hanging_function_is_interrupted_and_a_beating_one_is_not(manager, url, monkeypatch):
    """Hanging counts as an error of the task; heartbeats prevent it."""
    monkeypatch.setattr("qtorch.process.heartbeat.PAUSE_SECONDS", 0.02)
    manager.create_task(definitions(2))
    hangs = []

    def work(task):
        if task["number"] == 0 and not hangs:
            hangs.append(1)
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
    with pytest.raises(ConfigError, match="hang_after must be a number of seconds above 0"):
        run_task(work, manager.task_pool, url=url, hang_after=0)


def test_hanging_function_fails_with_its_traceback(manager, url):
    manager.create_task(definitions(1))

    def work(task):
        threading.Event().wait(20)

    run_task(work, manager.task_pool, url=url, hang_after=0.1)
    (task,) = manager.query()
    assert (task["status"], task["errors"], task["lost"]) == ("failed", 3, 0)
    assert task["error"] == "no sign of life for 0.1 s (hang_after)"
    assert "in work" in task["traceback"]


def test_hanging_function_in_a_thread_loses_its_lease(manager, url):
    """No signal reaches a thread: the lease expires, and the commit is rejected."""
    manager.create_task(definitions(1))
    go = threading.Event()
    options = {"url": url, "hang_after": 0.2, "lease": 0.4}
    thread = threading.Thread(
        target=run_task, args=(lambda task: go.wait(20), manager.task_pool), kwargs=options
    )
    thread.start()
    wait_until(lambda: manager.task_stat() == {"running": 1})
    wait_until(lambda: manager.fetch_task())
    (task,) = manager.query()
    assert (task["attempt"], task["lost"]) == (2, 1)
    go.set()
    thread.join(10)
    (task,) = manager.query()
    assert (task["status"], task["attempt"]) == ("running", 2)


def test_runs_in_a_thread(manager, url):
    manager.create_task(definitions(3))
    arguments = {"target": run_task, "args": (lambda task: 1, manager.task_pool)}
    thread = threading.Thread(**arguments, kwargs={"url": url})
    thread.start()
    thread.join(10)
    assert manager.task_stat() == {"done": 3}


STOPPABLE = """
import sys, time
from pool_workers import append_line
from qtorch.task import run_task

def work(task, journal, slow_stop):
    append_line(journal, "begin")
    try:
        time.sleep(30)
    finally:
        append_line(journal, "checkpoint")
        if slow_stop:
            time.sleep(30)

pool, url, journal, slow_stop = sys.argv[1:]
run_task(work, pool, url=url, journal=journal, slow_stop=slow_stop == "1")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_signal_returns_the_task_to_the_pool(manager, url, tmp_path, number):
    manager.create_task(definitions(2))
    journal = tmp_path / "journal"
    process = start(STOPPABLE, manager.task_pool, url, str(journal), "0")
    wait_until(lambda: journal.exists())
    process.send_signal(number)
    code = process.wait(10)
    assert code == (143 if number == signal.SIGTERM else -signal.SIGINT)
    assert journal.read_text() == "begin\ncheckpoint\n"
    first, second = manager.query()
    assert (first["status"], first["preemptions"], first["errors"]) == ("waiting", 1, 0)
    assert second["attempt"] == 0


def test_second_ctrl_c_ends_immediately(manager, url, tmp_path):
    manager.create_task(definitions(1))
    journal = tmp_path / "journal"
    process = start(STOPPABLE, manager.task_pool, url, str(journal), "1")
    wait_until(lambda: journal.exists())
    process.send_signal(signal.SIGINT)
    wait_until(lambda: "checkpoint" in journal.read_text())
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(10) != 0
    assert time.monotonic() - begin < 8


@pytest.mark.slow
def test_force_release_runs_each_task_in_its_own_process(manager, url, tmp_path, monkeypatch):
    """The death of the child is an error of the task."""
    monkeypatch.setenv("QTORCH_TRUSTED", "pool_workers")
    journal = str(tmp_path / "journal")
    manager.create_task([{"number": 1}, {"number": 2, "failure": "kill"}])
    run_task(
        pool_workers.report_pid, manager.task_pool, force_release=True, url=url, journal=journal
    )
    done_task, failed_task = manager.query()
    assert done_task["res"]["pid"] != os.getpid()
    assert (failed_task["status"], failed_task["errors"]) == ("failed", 3)
    assert "was killed by SIGKILL" in failed_task["error"]


@pytest.mark.slow
def test_hanging_child_is_killed(manager, url, tmp_path, monkeypatch):
    """It gets no time for a checkpoint, because another worker may have claimed the task."""
    monkeypatch.setenv("QTORCH_TRUSTED", "pool_workers")
    manager.create_task([{"number": 1, "failure": "hang"}])
    options = {"journal": str(tmp_path / "journal"), "hang_after": 4.0}
    begin = time.monotonic()
    run_task(
        pool_workers.report_pid,
        manager.task_pool,
        force_release=True,
        url=url,
        max_tasks=1,
        **options,
    )
    assert time.monotonic() - begin < 20
    (task,) = manager.query()
    assert (task["status"], task["errors"]) == ("waiting", 1)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "journal").read_text()), 0)


@pytest.mark.slow
def test_child_has_time_for_its_exit_functions(manager, url, tmp_path, monkeypatch):
    monkeypatch.setenv("QTORCH_TRUSTED", "pool_workers")
    manager.create_task(definitions(1))
    journal = tmp_path / "journal"
    run_task(
        pool_workers.end_slowly,
        manager.task_pool,
        force_release=True,
        url=url,
        journal=str(journal),
    )
    assert journal.read_text() == "exit\n"
    assert manager.task_stat() == {"done": 1}


@pytest.mark.slow
def test_result_of_a_child_that_finishes_after_a_stop_is_committed(manager, url, tmp_path):
    code = """
import sys, pool_workers
from qtorch.task import run_task
pool, url, journal = sys.argv[1:]
run_task(pool_workers.finish_in_spite_of_a_stop, pool, force_release=True, url=url, journal=journal)
"""
    manager.create_task(definitions(2))
    journal = tmp_path / "journal"
    process = start(code, manager.task_pool, url, str(journal))
    wait_until(lambda: journal.exists())
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    assert journal.read_text() == "begin\nstop\n"
    assert [(t["status"], t["res"], t["attempt"]) for t in manager.query()] == [
        ("done", 7, 1),
        ("waiting", None, 0),
    ]


@pytest.mark.slow
def test_fork_server_that_hangs_is_not_an_error_of_the_task(manager, url, tmp_path, monkeypatch):
    manager.create_task(definitions(1))
    server = task_fork_server(["pool_workers.report_pid"])
    server.ensure_running()
    os.kill(server._forkserver_pid, signal.SIGSTOP)
    with pytest.raises(ForkError, match="the fork server does not respond"):
        run_task(
            pool_workers.report_pid, manager.task_pool, force_release=True, url=url,
            hang_after=1.0, journal=str(tmp_path / "journal"),
        )  # fmt: skip
    (task,) = manager.query()
    assert (task["status"], task["errors"], task["preemptions"]) == ("waiting", 0, 1)


def test_stop_signal_during_a_claim_stops_the_claimed_task(manager, url, monkeypatch):
    """Between two tasks a signal interrupts nothing; the task must not run nevertheless."""
    manager.create_task(definitions(1))
    claim = TaskManager.fetch_task

    def claim_during_a_signal(manager, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return claim(manager, *arguments)

    monkeypatch.setattr(TaskManager, "fetch_task", claim_during_a_signal)
    with pytest.raises(SystemExit):
        run_task(lambda task: 1, manager.task_pool, url=url)
    (task,) = manager.query()
    assert (task["status"], task["preemptions"], task["errors"]) == ("waiting", 1, 0)


@pytest.mark.slow
def test_recorder_result_is_returned_as_recorder(manager, url, tmp_path):
    from qtorch.tracking import R

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    manager.create_task(definitions(1))

    def work(task):
        with R.uri_context(uri), R.start(experiment_name="e"):
            R.log_metrics(ic=0.1)
            return R.get_recorder()

    run_task(work, manager.task_pool, url=url)
    (task,) = manager.query()
    assert task["res"].list_metrics() == {"ic": 0.1}
    assert task["res"].uri == uri
    (encoded_task,) = manager.query(decode=False)
    assert encoded_task["res"]["$recorder"]["recorder_id"] == task["res"].id
    decoded_result = restore_recorders(decode_result(encode_result([task["res"], {"a": (1, 2)}])))
    assert decoded_result == [task["res"], {"a": [1, 2]}]


def test_task_manager_imports_no_heavy_library(tmp_path):
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
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert process.stdout.strip() == "[]"


def test_default_url_of_the_store(tmp_path, monkeypatch):
    import qtorch

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("QTORCH_TASK_URL", raising=False)
    assert TaskManager("p").url == f"sqlite:///{tmp_path}/mlruns/tasks.db"
    monkeypatch.setenv("QTORCH_TASK_URL", "sqlite:///e.db")
    assert TaskManager("p").url == "sqlite:///e.db"
    qtorch.init(task_url="sqlite:///i.db")
    assert TaskManager("p").url == "sqlite:///i.db"
    assert TaskManager("p", "sqlite:///u.db").url == "sqlite:///u.db"
