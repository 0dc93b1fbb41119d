"""`qtorch tasks`, and the words and tables that it shares with `qtorch worker`."""

from __future__ import annotations

import csv
import io
import json
import threading
import time

import pytest
from rich.console import Console

from qtorch.cli.main import main
from qtorch.cli.options import count, options_of, seconds, switch
from qtorch.cli.sent import _named
from qtorch.cli.task_text import duration, model_of
from qtorch.cli.worker_table import worker_table
from qtorch.core.errors import ConfigError
from qtorch.task import TaskManager
from qtorch.task.slot import View


@pytest.fixture
def pool(tmp_path, monkeypatch) -> TaskManager:
    """Six tasks: two models, three seeds; one done, one failed, one running, one begun."""
    monkeypatch.chdir(tmp_path)
    manager = TaskManager("pool")
    tasks = [
        {"model": {"_target_": "qtorch.model.LightningModel", "network": network}, "seed": seed}
        for network in ({"_target_": "qtorch.nn.LSTM", "hidden_size": 8}, "GRU")
        for seed in (0, 1, 2)
    ]
    manager.create_task(tasks)
    manager.commit_task_res(manager.fetch_task(), {"$recorder": {"recorder_id": "run1"}})
    manager.fail_task(manager.fetch_task(), ValueError("no [data] here"))
    task = manager.fetch_task(worker="host:7:0")
    metrics = {"train/loss": 1.0, "valid/loss": 0.25, "valid/ic": 0.05}
    progress = {"stage": "training", "epoch": 2, "epochs": 8, "metrics": metrics}
    manager.renew(task, progress=progress)
    manager.commit_task_res(manager.fetch_task(), [1], "part_done")
    manager.return_task(manager.fetch_task(status="part_done"), "part_done", preempted=True)
    yield manager
    manager.close()


@pytest.fixture
def told(pool, capsys):
    """`told("list", ...)`: exit code, output, errors."""

    def run(*words: str, code: int = 0) -> str:
        capsys.readouterr()
        assert main(["tasks", *words]) == code
        out, err = capsys.readouterr()
        return out if code == 0 else err

    return run


def test_list_and_stat(told):
    assert told("list").split() == ["pool"]
    out = told("list", "pool=pool")
    assert [line.split()[0] for line in out.splitlines()[3:] if line.strip()] == list("123456")
    assert "no [data] here" in out
    assert "training  2/8  valid/loss 0.25  valid/ic 0.05" in out
    assert "2 (1 returned)" in out
    assert "the newest 2 of 6" in told("list", "pool=pool", "limit=2")
    stat = "2 waiting, 1 running, 1 part_done, 1 done, 1 failed"
    assert told("stat", "pool=pool").strip() == stat
    assert told("stat", "pool=other").strip() == "no task"


@pytest.mark.parametrize(
    ("words", "ids"),
    [
        (["status=failed"], "2"),
        (["status=failed,done"], "1 2"),
        (["model=lstm"], "1 2 3"),
        (["model=LSTM,gru", "seed=2"], "3 6"),
        (["seed=0,1", "model=gru"], "4 5"),
        (["model.network.hidden_size=8", "seed=1"], "2"),
        (["id=2,5"], "2 5"),
        (["model.network=GRU"], "4 5 6"),
        (["seed=7"], ""),
    ],
)
def test_queries(told, words, ids):
    tasks = json.loads(told("export", "pool=pool", *words))
    assert " ".join(t["_id"] for t in tasks) == ids
    many = str(len(ids.split()))
    counted = told("stat", "pool=pool", *words).replace("no task", "0 none").split(", ")
    assert sum(int(part.split()[0]) for part in counted) == int(many)


def test_show(told, pool):
    out = told("show", "2", "pool=pool")
    assert "2 (failed)" in out
    assert "no [data] here" in out
    assert '"hidden_size": 8' in out
    assert "run1" in told("show", "1", "pool=pool")


def test_retry_reset_prioritize_remove(told, pool):
    def statuses() -> list[str]:
        return [t["status"] for t in pool.query({}, decode=False)]

    assert told("retry", "pool=pool").strip() == "1 task waits again"
    assert statuses()[1] == "waiting"
    assert pool.re_query("2")["errors"] == 0
    assert told("reset", "pool=pool").strip() == "1 task waits again"
    assert statuses()[2:4] == ["waiting", "part_done"]
    assert told("reset", "pool=pool", "status=part_done").strip() == "1 task waits again"
    assert statuses()[3] == "part_done"  # as the delayed trainer left it
    assert told("prioritize", "pool=pool", "priority=5", "seed=2").strip() == (
        "2 tasks have priority 5"
    )
    assert pool.fetch_task()["_id"] == "3"
    assert told("remove", "pool=pool", "model=gru").strip() == "3 tasks are removed"
    assert "all=true" in told("remove", "pool=pool", code=1)
    assert told("remove", "pool=pool", "all=true").strip() == "3 tasks are removed"


def test_a_failed_task_that_had_begun_goes_back_to_where_it_was(told, pool):
    task = pool.fetch_task(status="part_done")
    pool.fail_task(task, "broken")
    told("retry", "pool=pool", f"id={task['_id']}")
    assert pool.re_query(task["_id"])["status"] == "part_done"


def test_export(told, tmp_path):
    assert told("export", "pool=pool", "out=tasks.csv").strip() == "6 tasks in tasks.csv"
    rows = list(csv.DictReader(io.StringIO((tmp_path / "tasks.csv").read_text())))
    assert [(r["id"], r["model"], r["seed"], r["status"]) for r in rows[:2]] == [
        ("1", "LSTM", "0", "done"),
        ("2", "LSTM", "1", "failed"),
    ]
    assert rows[0]["run"] == "run1"
    told("export", "pool=pool", "out=tasks.json", "seed=0")
    assert [t["_id"] for t in json.loads((tmp_path / "tasks.json").read_text())] == ["1", "4"]
    assert "ends in .json or .csv" in told("export", "pool=pool", "out=tasks.xls", code=1)


def test_wait_wakes_within_a_second_of_the_last_commit(told, pool):
    assert told("wait", "pool=pool", "id=1").startswith("1 done after 0.")
    assert "error: task 2: ValueError: no [data] here" in told(
        "wait", "pool=pool", "id=1,2", code=1
    )
    assert "1 unfinished task of pool 'pool': 5 (waiting)" in told(
        "wait", "pool=pool", "id=5", "timeout=0.1", code=1
    )
    committed = []

    def work() -> None:
        time.sleep(0.3)
        manager = TaskManager("pool")
        manager.commit_task_res(manager.fetch_task({"_id": "5"}), 1)
        committed.append(time.monotonic())

    worker = threading.Thread(target=work)
    worker.start()
    told("wait", "pool=pool", "model=gru", "seed=1")
    assert time.monotonic() - committed[0] < 1.0
    worker.join()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lits"], "Did you mean 'list'?"),
        (["stat"], "needs pool=..."),
        (["stat", "pool=pool", "status=faild"], "Did you mean 'failed'?"),
        (["stat", "pool=pool", "failed"], "is no part of a query"),
        (["stat", "pool=pool", "url=redis://x"], "names no store"),
        (["wait", "pool=pool", "timeout=soon"], "expected a number of seconds"),
        (["show", "pool=pool"], "takes the id"),
        (["show", "99", "pool=pool"], "takes the id"),
        (["prioritize", "pool=pool"], "needs priority=..."),
    ],
)
def test_what_a_user_gets_wrong(told, words, said):
    err = told(*words, code=1)
    assert said in err
    assert len([line for line in err.splitlines() if line.startswith("error:")]) == 1


def test_options():
    readers = {"a": count, "b": seconds, "c": switch, "d": str}
    words = ["a=3", "b=0.5", "c=yes", "d=x?y=z", "a=none"]
    assert options_of(words, readers, "it") == {"a": None, "b": 0.5, "c": True, "d": "x?y=z"}
    for word, said in {
        "a=0": "a whole number from 1",
        "b=-1": "a number of seconds",
        "c=maybe": "true or false",
        "dd=1": "Did you mean 'd'",
    }.items():
        with pytest.raises(ConfigError, match=said):
            options_of([word], readers, "it")


def test_a_pool_is_named_without_a_password(monkeypatch):
    """What is printed for other terminals shows no secret, and no URL that each of them has."""
    url = "postgresql+psycopg://me:secret@db/pool"
    assert _named("zoo", url) == "pool=zoo url=postgresql+psycopg://me:***@db/pool"
    monkeypatch.setenv("QTORCH_TASK_URL", url)
    assert _named("zoo", url) == "pool=zoo"


def test_texts():
    assert [duration(s) for s in (None, 4.21, 185, 3727)] == ["-", "4.2 s", "3:05", "1:02:07"]
    network = {"class": "GRU", "module_path": "qtorch.nn"}
    told = [
        {"model": {"class": "LightningModel", "kwargs": {"network": network}}},
        {"model": "my.models.Mine"},
        {"model": {"_target_": "my.Other", "network": None}},
        {"model": None},
        "broken",
    ]
    assert [model_of(t) for t in told] == ["GRU", "Mine", "Other", "", ""]


def test_the_live_table(pool):
    task = pool.re_query("3", decode=False)
    busy = View("slot 0", "0", task, time.monotonic() - 65, progress=task["progress"])
    busy.progress["samples_per_second"] = 12345
    busy.counts["done"] = 2
    console = Console(width=160, file=io.StringIO())
    console.print(worker_table("pool", [busy, View("slot 1", "1")]))
    shown = console.file.getvalue()
    for text in ("pool pool: 2 done", "LSTM", "training", "2/8", "12,345", "valid/ic 0.05", "1:05"):
        assert text in shown
    assert "idle" in shown
