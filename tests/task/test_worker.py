"""`qtorch worker` as real processes: what they do with tasks, signals and children that die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pool_workers import HERE, until

from qtorch.task import TaskManager
from qtorch.task.query import parse_query
from qtorch.task.store import Change

pytestmark = pytest.mark.slow


class Pool:
    """A pool (on SQLite unless it is told), its workers, and what its tasks wrote."""

    def __init__(self, folder: Path, url: str | None = None, name: str = "pool") -> None:
        self.folder, self.url, self.name = folder, url or f"sqlite:///{folder}/tasks.db", name
        self.manager = TaskManager(name, self.url, lease=2.0)
        self.journal, self.go = folder / "journal", folder / "go"
        self.workers: list[subprocess.Popen[str]] = []

    def add(self, *hows: str) -> list[str]:
        """A task for each way to act; their ids."""
        shared = {"journal": str(self.journal), "go": str(self.go)}
        first = sum(self.manager.task_stat().values())
        defs = [{"how": how, "number": first + k, **shared} for k, how in enumerate(hows)]
        return self.manager.create_task(defs)

    def start(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        """A worker in its own process group."""
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
        """What the attempts wrote."""
        return [line.split() for line in self.journal.read_text().splitlines()]

    def child(self) -> int:
        """The process of the newest attempt."""
        return int([line for line in self.lines() if line[0] != "checkpoint"][-1][1])

    def task(self, id: str) -> Any:
        return self.manager.re_query(id)

    def runs(self, id: str) -> bool:
        """Whether the task is in mid-work, and its run is known to the pool."""
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
    made = Pool(tmp_path)
    yield made
    made.close()


@pytest.fixture
def pool_anywhere(tmp_path, url, pool_name) -> Iterator[Pool]:
    """A pool on each store in turn."""
    made = Pool(tmp_path, url, pool_name)
    yield made
    made.close()


def alive(pid: int) -> bool:
    try:
        return "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def ended(worker: subprocess.Popen[str], seconds: float = 30.0) -> str:
    out, _ = worker.communicate(timeout=seconds)
    return out


def test_good_bad_and_deadly_tasks(pool):
    ids = pool.add("quick", "raise", "die", "exit", "quick")
    out = ended(pool.start("idle_timeout=0.5", "lease=5"), 60)
    assert pool.workers[0].returncode == 0, out
    tasks = [pool.task(i) for i in ids]
    assert [t["status"] for t in tasks] == ["done", "failed", "failed", "failed", "done"]
    assert tasks[0]["res"] == {"number": 0, "device": "", "run": None}
    assert tasks[1]["error"] == "ValueError: this task fails"
    assert 'raise ValueError("this task' in tasks[1]["traceback"]
    assert tasks[2]["error"] == "the task's process was ended by SIGKILL"
    assert tasks[3]["error"] == "SystemExit: 3"
    assert [(t["errors"], t["lost"]) for t in tasks[1:4]] == [(3, 0)] * 3
    lines = pool.lines()
    assert len(lines) == 2 + 3 * 3
    parent = {line[2] for line in lines}
    assert len(parent) == 1
    assert "ended: 2 done, 9 failed, 0 returned, 0 lost" in out


def test_one_child_serves_many_tasks_unless_each_shall_have_its_own(pool):
    pool.add(*["quick"] * 3)
    ended(pool.start("idle_timeout=0"))
    assert len({line[1] for line in pool.lines()}) == 1
    pool.journal.unlink()
    pool.add(*["quick"] * 3)
    ended(pool.start("idle_timeout=0", "force_release=true"))
    assert len({line[1] for line in pool.lines()}) == 3


def test_max_tasks_and_several_to_a_device(pool):
    pool.add(*["quick"] * 6)
    out = ended(pool.start("max_tasks=4", "devices=7,9", "per_device=2", "idle_timeout=30"))
    assert pool.manager.task_stat() == {"done": 4, "waiting": 2}, out
    devices = {t["res"]["device"] for t in pool.manager.query({"status": "done"})}
    assert devices <= {"7", "9"}


def test_what_is_not_trusted_or_not_there_fails_with_the_reason(pool):
    targets = {"os.system": "QTORCH_TRUSTED", "qtorch.nn.LSTN": "Did you mean 'LSTM'"}
    definitions = [{"model": {"_target_": name, "command": "true"}} for name in targets]
    ids = [*pool.manager.create_task([*definitions, {"broken": 1}]), *pool.add("quick")]
    broken = parse_query({"_id": ids[2]})
    pool.manager._pool._store().change_all("pool", broken, Change({"definition": '{"model": '}))
    ended(pool.start("idle_timeout=0"))
    for id, said in zip(ids, [*targets.values(), "is no JSON"], strict=False):
        task = pool.task(id)
        assert (task["status"], task["errors"]) == ("failed", 1)
        assert said in task["error"]
    assert pool.task(ids[-1])["status"] == "done"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["func=worker_parts.akt"], "Did you mean 'act'"),
        (["func=no_such_module.act"], "no_such_module"),
        (["func=broken_library.act"], "ended with code 1"),
    ],
)
def test_a_worker_that_cannot_work_spoils_no_task(pool, words, said):
    """A wrong function, a library that does not load: the tasks are not to blame."""
    (id,) = pool.add("quick")
    (pool.folder / "broken_library.py").write_text("import os\nos._exit(1)\n")
    worker = pool.start(*words)
    out = ended(worker)
    assert worker.returncode == 1
    assert said in out.splitlines()[-1]
    task = pool.task(id)
    assert (task["status"], task["errors"], task["lost"]) == ("waiting", 0, 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_hands_the_task_back_with_a_checkpoint(pool, number):
    (id,) = pool.add("long")
    worker = pool.start("lease=30")
    until(lambda: pool.runs(id))
    begin = time.monotonic()
    worker.send_signal(number)
    out = ended(worker)
    assert time.monotonic() - begin < 5
    assert worker.returncode == 128 + number, out
    task = pool.task(id)
    assert (task["status"], task["preemptions"], task["errors"], task["lost"]) == (
        "waiting", 1, 0, 0,
    )  # fmt: skip
    assert pool.lines()[-1][0] == "checkpoint"
    assert not alive(pool.child())
    pool.go.touch()
    ended(pool.start("idle_timeout=0"))
    assert pool.task(id)["res"]["run"] == "run0"


def test_a_schedulers_signal_to_every_process_still_leaves_a_checkpoint(pool):
    (id,) = pool.add("long")
    worker = pool.start("lease=30")
    until(lambda: pool.runs(id))
    for pid in (worker.pid, pool.child()):
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
            os.kill(pid, number)
    ended(worker)
    assert worker.returncode == 128 + signal.SIGUSR1
    assert pool.lines()[-1][0] == "checkpoint"
    assert pool.task(id)["preemptions"] == 1


def test_a_second_signal_ends_at_once(pool):
    (id,) = pool.add("hang")
    worker = pool.start("lease=30", "grace=60")
    until(lambda: pool.journal.exists())
    child = pool.child()
    os.kill(child, signal.SIGSTOP)  # it cannot answer
    worker.send_signal(signal.SIGINT)
    time.sleep(1.0)
    assert worker.poll() is None
    begin = time.monotonic()
    worker.send_signal(signal.SIGINT)
    ended(worker)
    assert time.monotonic() - begin < 5
    assert worker.returncode == 130
    assert not alive(child)
    assert (pool.task(id)["status"], pool.task(id)["preemptions"]) == ("waiting", 1)


def test_a_child_that_hangs_does_not_keep_its_task(pool):
    (id,) = pool.add("hang")
    out = ended(pool.start("hang_after=1", "lease=2", "idle_timeout=0.5"), 60)
    task = pool.task(id)
    assert (task["status"], task["errors"], task["lost"]) == ("failed", 3, 0), out
    assert "no sign of life for 1 s" in task["error"]


def test_kill_9_of_the_worker_ends_its_child_and_frees_its_task(pool):
    (id,) = pool.add("long")
    worker = pool.start("lease=2")
    until(lambda: pool.runs(id))
    child = pool.child()
    worker.kill()
    until(lambda: not alive(child), 2.0)
    pool.go.touch()
    ended(pool.start("lease=2", "idle_timeout=4"))
    task = pool.task(id)
    assert (task["status"], task["attempt"], task["lost"]) == ("done", 2, 1)
    assert task["res"]["run"] == "run0"


def test_kill_9_of_the_child_is_an_error_of_the_task(pool):
    (id,) = pool.add("long")
    pool.start("lease=2")
    until(lambda: pool.runs(id))
    os.kill(pool.child(), signal.SIGKILL)
    pool.go.touch()
    until(lambda: pool.task(id)["status"] == "done")
    task = pool.task(id)
    assert (task["attempt"], task["errors"], task["res"]["run"]) == (2, 1, "run0")


def test_the_process_that_begins_children_is_begun_anew(pool):
    """Killed, its child keeps a checkpoint and the task goes back, uncounted; and again."""
    (id,) = pool.add("long")
    worker = pool.start("lease=30")
    for attempt, number in enumerate((signal.SIGKILL, signal.SIGTERM), start=1):
        until(lambda: pool.runs(id) and pool.task(id)["attempt"] == attempt)  # noqa: B023
        child, zygote = pool.child(), int(pool.lines()[-1][2])
        assert zygote != worker.pid
        os.kill(zygote, number)
        until(lambda: not alive(child))  # noqa: B023
        assert pool.lines()[-1] == ["checkpoint", str(child)]
    pool.go.touch()
    until(lambda: pool.task(id)["status"] == "done")
    task = pool.task(id)
    assert (task["attempt"], task["preemptions"], task["errors"], task["lost"]) == (3, 2, 0, 0)


def test_what_begins_children_and_does_nothing_is_replaced(pool):
    ids = pool.add("quick")
    worker = pool.start("force_release=true", "hang_after=3")
    until(lambda: pool.task(ids[0])["status"] == "done")
    zygote = int(pool.lines()[-1][2])
    os.kill(zygote, signal.SIGSTOP)
    ids += pool.add("quick", "quick")
    until(lambda: pool.manager.task_stat() == {"done": 3})
    assert [pool.task(id)["errors"] for id in ids] == [0, 0, 0]
    assert not alive(zygote)
    os.kill(int(pool.lines()[-1][2]), signal.SIGSTOP)
    worker.terminate()
    ended(worker, 60)  # it gives the stopped process some time, and no more
    assert worker.returncode == 128 + signal.SIGTERM


def test_modules_of_the_working_folder_are_found(pool):
    """By the command that pip installs too, whose own folder is another one."""
    (pool.folder / "lies_here.py").write_text("def act(definition):\n    return 7\n")
    (id,) = pool.add("quick")
    command = str(Path(sys.executable).with_name("qtorch"))
    words = [f"pool={pool.name}", f"url={pool.url}", "func=lies_here.act", "idle_timeout=0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "QTORCH_TRUSTED": "lies_here"}
    subprocess.run(
        [command, "worker", *words], cwd=pool.folder, env=environment, check=True, timeout=60
    )
    assert pool.task(id)["res"] == 7


def test_a_stopped_worker_loses_its_lease_its_child_and_its_say(pool):
    """SIGSTOP: the child ends itself before the lease does, another worker does the task once."""
    (id,) = pool.add("long")
    worker = pool.start("lease=2")
    until(lambda: pool.runs(id))
    child = pool.child()
    os.kill(worker.pid, signal.SIGSTOP)
    until(lambda: not alive(child), 2.0)
    assert pool.manager.fetch_task() is None  # the lease is not over yet
    other = pool.start("lease=2")
    until(lambda: pool.task(id)["attempt"] == 2)
    until(lambda: pool.runs(id))
    os.kill(worker.pid, signal.SIGCONT)
    time.sleep(1.0)
    pool.go.touch()
    until(lambda: pool.task(id)["status"] == "done")
    task = pool.task(id)
    assert (task["attempt"], task["errors"], task["lost"]) == (2, 0, 1)
    assert task["worker"]["pid"] == other.pid
    worker.terminate()
    assert "is no longer ours" in ended(worker)


def test_every_store_serves_workers(pool_anywhere):
    pool = pool_anywhere
    (id,) = pool.add("long")
    first = pool.start("lease=2")
    until(lambda: pool.runs(id))
    pool.add(*["quick"] * 3)
    first.kill()
    pool.go.touch()
    out = ended(pool.start("lease=2", "idle_timeout=4", "per_device=2"), 60)
    assert pool.manager.task_stat() == {"done": 4}, out
    task = pool.task(id)
    assert (task["attempt"], task["lost"], task["res"]["run"]) == (2, 1, "run0")


def test_a_store_that_is_locked_for_longer_than_a_lease(pool):
    """Work in hand goes on, and is committed when the store answers again."""
    import sqlite3

    (id,) = pool.add("long")
    worker = pool.start("lease=2")
    until(lambda: pool.runs(id))
    child = pool.child()
    lock = sqlite3.connect(pool.folder / "tasks.db", isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    time.sleep(2.0)
    pool.go.touch()
    time.sleep(2.0)
    assert worker.poll() is None
    assert alive(child)
    lock.rollback()
    lock.close()
    until(lambda: pool.task(id)["status"] == "done")
    assert (pool.task(id)["attempt"], pool.task(id)["lost"]) == (1, 0)


def test_a_supervisor_is_small_and_starts_quickly():
    code = (
        "import sys, time, qtorch.cli.worker, qtorch.task.sql, qtorch.task.supervisor;"
        "print([m for m in ('torch', 'mlflow', 'pandas', 'numpy', 'pytorch_lightning', 'hydra')"
        " if m in sys.modules], time.process_time(), sep='|')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy, seconds = done.stdout.strip().split("|")
    assert heavy == "[]"
    assert float(seconds) < 1.0


def test_what_a_user_gets_wrong(pool):
    words: dict[str, Callable[[str], bool]] = {
        "lease=x": lambda out: "expected a number of seconds" in out,
        "leese=3": lambda out: "Did you mean 'lease'" in out,
        "lease=0": lambda out: "above 0" in out,
        "devices=,": lambda out: "expected auto, cpu" in out,
        "url=redis://x": lambda out: "names no store" in out,
    }
    for word, said in words.items():
        out = ended(pool.start(word))
        assert "Traceback" not in out, out
        assert said(out), out
