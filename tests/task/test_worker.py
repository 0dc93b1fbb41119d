"""`qtorch worker` in real processes: tasks, stop signals, and children that die or hang."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pool_workers import HERE, wait_until

from qtorch.task import TaskManager
from qtorch.task.stores.base import Change, parse_query

pytestmark = pytest.mark.slow


class Pool:
    """A pool (by default on SQLite), its workers, and the journal of its tasks."""

    def __init__(self, folder: Path, url: str | None = None, name: str = "pool") -> None:
        self.folder, self.url, self.name = folder, url or f"sqlite:///{folder}/tasks.db", name
        self.manager = TaskManager(name, self.url, lease=2.0)
        self.journal, self.go = folder / "journal", folder / "go"
        self.workers: list[subprocess.Popen[str]] = []

    def add(self, *behaviors: str) -> list[str]:
        """Create a task for each behavior; return their ids."""
        paths = {"journal": str(self.journal), "go": str(self.go)}
        first = sum(self.manager.task_stat().values())
        defs = [
            {"behavior": name, "number": first + k, **paths} for k, name in enumerate(behaviors)
        ]
        return self.manager.create_task(defs)

    def start(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        """Start a worker in its own process group."""
        command = [sys.executable, "-m", "qtorch.cli.main", "worker", f"pool={self.name}"]
        path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
        worker = subprocess.Popen(
            [*command, f"url={self.url}", "func=worker_parts.act", "devices=cpu", *words],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.workers.append(worker)
        return worker

    def lines(self) -> list[list[str]]:
        """Return the lines of the journal, split into words."""
        return [line.split() for line in self.journal.read_text().splitlines()]

    def child(self) -> int:
        """Return the process id of the latest attempt."""
        return int([line for line in self.lines() if line[0] != "checkpoint"][-1][1])

    def task(self, id: str) -> Any:
        return self.manager.re_query(id)

    def is_running(self, id: str) -> bool:
        """Whether the task is running and the pool knows its run and progress."""
        task = self.task(id)
        return task["status"] == "running" and bool(task["run"]) and bool(task["progress"])

    def close(self) -> None:
        for worker in self.workers:
            if worker.poll() is None:
                os.kill(worker.pid, signal.SIGCONT)
                worker.kill()
            worker.communicate()
        self.manager.close()


@pytest.fixture
def pool(tmp_path) -> Iterator[Pool]:
    test_pool = Pool(tmp_path)
    yield test_pool
    test_pool.close()


@pytest.fixture
def pool_on_store(tmp_path, url, pool_name) -> Iterator[Pool]:
    """A pool on each kind of store."""
    test_pool = Pool(tmp_path, url, pool_name)
    yield test_pool
    test_pool.close()


def is_alive(pid: int) -> bool:
    try:
        return "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def wait_for_output(worker: subprocess.Popen[str], seconds: float = 30.0) -> str:
    out, _ = worker.communicate(timeout=seconds)
    return out


def test_failing_and_killing_tasks_do_not_stop_the_worker(pool):
    ids = pool.add("quick", "raise", "die", "exit", "quick")
    out = wait_for_output(pool.start("idle_timeout=0.5", "lease=5"), 60)
    assert pool.workers[0].returncode == 0, out
    tasks = [pool.task(i) for i in ids]
    assert [t["status"] for t in tasks] == ["done", "failed", "failed", "failed", "done"]
    assert tasks[0]["res"] == {"number": 0, "device": "", "run": None}
    assert tasks[1]["error"] == "ValueError: this task fails"
    assert 'raise ValueError("this task' in tasks[1]["traceback"]
    assert tasks[2]["error"] == "the task's process was killed by SIGKILL"
    assert tasks[3]["error"] == "SystemExit: 3"
    assert [(t["errors"], t["lost"]) for t in tasks[1:4]] == [(3, 0)] * 3
    lines = pool.lines()
    assert len(lines) == 2 + 3 * 3
    parent_ids = {line[2] for line in lines}
    assert len(parent_ids) == 1
    assert "finished: 2 done, 9 failed, 0 returned, 0 lost" in out


def test_child_runs_many_tasks_unless_force_release_is_set(pool):
    pool.add(*["quick"] * 3)
    wait_for_output(pool.start("idle_timeout=0"))
    assert len({line[1] for line in pool.lines()}) == 1
    pool.journal.unlink()
    pool.add(*["quick"] * 3)
    wait_for_output(pool.start("idle_timeout=0", "force_release=true"))
    assert len({line[1] for line in pool.lines()}) == 3


def test_max_tasks_with_several_slots_per_device(pool):
    pool.add(*["quick"] * 6)
    out = wait_for_output(
        pool.start("max_tasks=4", "devices=7,9", "per_device=2", "idle_timeout=30")
    )
    assert pool.manager.task_stat() == {"done": 4, "waiting": 2}, out
    devices = {t["res"]["device"] for t in pool.manager.query({"status": "done"})}
    assert devices <= {"7", "9"}


def test_untrusted_or_invalid_definition_fails_with_the_reason(pool):
    targets = {"os.system": "QTORCH_TRUSTED", "qtorch.nn.LSTN": "Did you mean 'LSTM'"}
    definitions = [{"model": {"_target_": name, "command": "true"}} for name in targets]
    ids = [*pool.manager.create_task([*definitions, {"broken": 1}]), *pool.add("quick")]
    condition = parse_query({"_id": ids[2]})
    pool.manager._pool._store().change_all("pool", condition, Change({"definition": '{"model": '}))
    wait_for_output(pool.start("idle_timeout=0"))
    for id, message in zip(ids, [*targets.values(), "is not valid JSON"], strict=False):
        task = pool.task(id)
        assert (task["status"], task["errors"]) == ("failed", 1)
        assert message in task["error"]
    assert pool.task(ids[-1])["status"] == "done"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["func=worker_parts.akt"], "Did you mean 'act'"),
        (["func=no_such_module.act"], "no_such_module"),
        (["func=broken_library.act"], "exited with code 1"),
    ],
)
def test_worker_that_cannot_run_tasks_does_not_fail_them(pool, words, message):
    """A wrong function or a library that cannot be loaded is not the fault of the tasks."""
    (id,) = pool.add("quick")
    (pool.folder / "broken_library.py").write_text("import os\nos._exit(1)\n")
    worker = pool.start(*words)
    out = wait_for_output(worker)
    assert worker.returncode == 1
    assert message in out.splitlines()[-1]
    task = pool.task(id)
    assert (task["status"], task["errors"], task["lost"]) == ("waiting", 0, 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_signal_returns_the_task_after_a_checkpoint(pool, number):
    (id,) = pool.add("long")
    worker = pool.start("lease=30")
    wait_until(lambda: pool.is_running(id))
    begin = time.monotonic()
    worker.send_signal(number)
    out = wait_for_output(worker)
    assert time.monotonic() - begin < 5
    assert worker.returncode == 128 + number, out
    task = pool.task(id)
    assert (task["status"], task["preemptions"], task["errors"], task["lost"]) == (
        "waiting", 1, 0, 0,
    )  # fmt: skip
    assert pool.lines()[-1][0] == "checkpoint"
    assert not is_alive(pool.child())
    pool.go.touch()
    wait_for_output(pool.start("idle_timeout=0"))
    assert pool.task(id)["res"]["run"] == "run0"


def test_scheduler_signals_to_every_process_still_allow_a_checkpoint(pool):
    (id,) = pool.add("long")
    worker = pool.start("lease=30")
    wait_until(lambda: pool.is_running(id))
    for pid in (worker.pid, pool.child()):
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
            with contextlib.suppress(ProcessLookupError):  # the first one may already have ended it
                os.kill(pid, number)
    wait_for_output(worker)
    # The system may give the signals to different threads, so the second may be handled first.
    assert worker.returncode in (128 + signal.SIGUSR1, 128 + signal.SIGTERM)
    assert pool.lines()[-1][0] == "checkpoint"
    assert pool.task(id)["preemptions"] == 1


def test_second_ctrl_c_ends_immediately(pool):
    (id,) = pool.add("hang")
    worker = pool.start("lease=30", "grace=60")
    wait_until(lambda: pool.journal.exists())
    child = pool.child()
    os.kill(child, signal.SIGSTOP)  # the child cannot react
    worker.send_signal(signal.SIGINT)
    time.sleep(1.0)
    assert worker.poll() is None
    begin = time.monotonic()
    worker.send_signal(signal.SIGINT)
    wait_for_output(worker)
    assert time.monotonic() - begin < 5
    assert worker.returncode == 130
    assert not is_alive(child)
    assert (pool.task(id)["status"], pool.task(id)["preemptions"]) == ("waiting", 1)


def test_task_of_a_hanging_child_fails(pool):
    (id,) = pool.add("hang")
    out = wait_for_output(pool.start("hang_after=1", "lease=2", "idle_timeout=0.5"), 60)
    task = pool.task(id)
    assert (task["status"], task["errors"], task["lost"]) == ("failed", 3, 0), out
    assert "no sign of life for 1 s" in task["error"]


def test_killed_worker_ends_its_child_and_loses_its_task(pool):
    (id,) = pool.add("long")
    worker = pool.start("lease=2")
    wait_until(lambda: pool.is_running(id))
    child = pool.child()
    worker.kill()
    wait_until(lambda: not is_alive(child), 2.0)
    pool.go.touch()
    wait_for_output(pool.start("lease=2", "idle_timeout=4"))
    task = pool.task(id)
    assert (task["status"], task["attempt"], task["lost"]) == ("done", 2, 1)
    assert task["res"]["run"] == "run0"


def test_killed_child_is_an_error_of_the_task(pool):
    (id,) = pool.add("long")
    pool.start("lease=2")
    wait_until(lambda: pool.is_running(id))
    os.kill(pool.child(), signal.SIGKILL)
    pool.go.touch()
    wait_until(lambda: pool.task(id)["status"] == "done")
    task = pool.task(id)
    assert (task["attempt"], task["errors"], task["res"]["run"]) == (2, 1, "run0")


def test_fork_server_that_is_killed_is_replaced(pool):
    """The running child continues; the next one comes from a new server. Signals do no harm."""
    (id,) = pool.add("long")
    pool.start("lease=30", "force_release=true")
    wait_until(lambda: pool.is_running(id))
    server_id = int(pool.lines()[-1][2])
    os.kill(server_id, signal.SIGTERM)
    os.kill(server_id, signal.SIGKILL)
    pool.go.touch()
    wait_until(lambda: pool.task(id)["status"] == "done")
    (next_id,) = pool.add("quick")
    wait_until(lambda: pool.task(next_id)["status"] == "done")
    assert int(pool.lines()[-1][2]) != server_id
    for task in (pool.task(id), pool.task(next_id)):
        assert (task["attempt"], task["preemptions"], task["errors"], task["lost"]) == (1, 0, 0, 0)


def test_hanging_fork_server_is_replaced(pool):
    ids = pool.add("quick")
    worker = pool.start("force_release=true", "hang_after=3")
    wait_until(lambda: pool.task(ids[0])["status"] == "done")
    server_id = int(pool.lines()[-1][2])
    os.kill(server_id, signal.SIGSTOP)
    ids += pool.add("quick", "quick")
    wait_until(lambda: pool.manager.task_stat() == {"done": 3})
    assert [pool.task(id)["errors"] for id in ids] == [0, 0, 0]
    assert not is_alive(server_id)
    os.kill(int(pool.lines()[-1][2]), signal.SIGSTOP)
    worker.terminate()
    wait_for_output(worker, 60)  # the worker waits only a limited time for the stopped server
    assert worker.returncode == 128 + signal.SIGTERM


def test_modules_of_the_working_folder_can_be_imported(pool):
    """Also by the installed command `qtorch`, whose own folder is another one."""
    (pool.folder / "local_module.py").write_text("def act(definition):\n    return 7\n")
    (id,) = pool.add("quick")
    command = str(Path(sys.executable).with_name("qtorch"))
    words = [f"pool={pool.name}", f"url={pool.url}", "func=local_module.act", "idle_timeout=0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "QTORCH_TRUSTED": "local_module"}
    subprocess.run(
        [command, "worker", *words], cwd=pool.folder, env=environment, check=True, timeout=60
    )
    assert pool.task(id)["res"] == 7


def test_paused_worker_loses_its_lease_and_its_child(pool):
    """SIGSTOP: the child kills itself before the lease expires; another worker runs the task."""
    (id,) = pool.add("long")
    worker = pool.start("lease=2")
    wait_until(lambda: pool.is_running(id))
    child = pool.child()
    os.kill(worker.pid, signal.SIGSTOP)
    wait_until(lambda: not is_alive(child), 2.0)
    assert pool.manager.fetch_task() is None  # the lease has not expired yet
    second_worker = pool.start("lease=2")
    wait_until(lambda: pool.task(id)["attempt"] == 2)
    wait_until(lambda: pool.is_running(id))
    os.kill(worker.pid, signal.SIGCONT)
    time.sleep(1.0)
    pool.go.touch()
    wait_until(lambda: pool.task(id)["status"] == "done")
    task = pool.task(id)
    assert (task["attempt"], task["errors"], task["lost"]) == (2, 0, 1)
    assert task["worker"]["pid"] == second_worker.pid
    worker.terminate()
    assert "lost the lease" in wait_for_output(worker)


def test_workers_on_every_store(pool_on_store):
    pool = pool_on_store
    (id,) = pool.add("long")
    first = pool.start("lease=2")
    wait_until(lambda: pool.is_running(id))
    pool.add(*["quick"] * 3)
    first.kill()
    pool.go.touch()
    out = wait_for_output(pool.start("lease=2", "idle_timeout=4", "per_device=2"), 60)
    assert pool.manager.task_stat() == {"done": 4}, out
    task = pool.task(id)
    assert (task["attempt"], task["lost"], task["res"]["run"]) == (2, 1, "run0")


def test_store_that_is_locked_longer_than_the_lease(pool):
    """The running task continues, and is committed when the store answers again."""
    import sqlite3

    (id,) = pool.add("long")
    worker = pool.start("lease=2")
    wait_until(lambda: pool.is_running(id))
    child = pool.child()
    lock = sqlite3.connect(pool.folder / "tasks.db", isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    time.sleep(2.0)
    pool.go.touch()
    time.sleep(2.0)
    assert worker.poll() is None
    assert is_alive(child)
    lock.rollback()
    lock.close()
    wait_until(lambda: pool.task(id)["status"] == "done")
    assert (pool.task(id)["attempt"], pool.task(id)["lost"]) == (1, 0)


def test_supervisor_imports_no_heavy_library_and_starts_quickly():
    code = (
        "import sys, time, qtorch.cli.worker, qtorch.task.stores.sql, qtorch.task.worker;"
        "print([m for m in ('torch', 'mlflow', 'pandas', 'numpy', 'pytorch_lightning', 'hydra')"
        " if m in sys.modules], time.process_time(), sep='|')"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    modules, seconds = process.stdout.strip().split("|")
    assert modules == "[]"
    assert float(seconds) < 1.0


def test_invalid_options_are_reported_without_a_traceback(pool):
    words: dict[str, Callable[[str], bool]] = {
        "lease=x": lambda out: "expected a number of seconds" in out,
        "leese=3": lambda out: "Did you mean 'lease'" in out,
        "lease=0": lambda out: "above 0" in out,
        "devices=,": lambda out: "expected auto, cpu" in out,
        "url=redis://x": lambda out: "names no store" in out,
    }
    for word, is_expected in words.items():
        out = wait_for_output(pool.start(word))
        assert "Traceback" not in out, out
        assert is_expected(out), out
