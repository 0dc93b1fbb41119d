"""Tests of `qtorch tasks`, and of the texts and tables that it shares with `qtorch worker`."""

from __future__ import annotations

import csv
import io
import json
import threading
import time
from pathlib import Path

import pytest

from qtorch.cli.jobs.pool_jobs import pool_options
from qtorch.cli.main import main
from qtorch.cli.options import parse_bool, parse_count, parse_options, parse_seconds
from qtorch.cli.tables.tasks import format_duration, model_name, worker_table
from qtorch.core.errors import ConfigError
from qtorch.core.terminal import Terminal
from qtorch.task import TaskManager
from qtorch.task.worker import SlotStatus


@pytest.fixture
def pool(tmp_path, monkeypatch) -> TaskManager:
    """A pool of six tasks with two models and three seeds, in all statuses."""
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
    manager.return_task(manager.fetch_task(status="part_done"), "part_done", is_preempted=True)
    yield manager
    manager.close()


@pytest.fixture
def run_tasks(pool, capsys):
    """Return `run_tasks("list", ...)`: check the exit code, return the output or errors."""

    def run(*words: str, code: int = 0) -> str:
        capsys.readouterr()
        assert main(["tasks", *words]) == code
        out, err = capsys.readouterr()
        return out if code == 0 else err

    return run


def test_list_and_stat(run_tasks):
    assert run_tasks("list").split() == ["pool"]
    out = run_tasks("list", "pool=pool")
    assert [line.split()[0] for line in out.splitlines()[3:] if line.strip()] == list("123456")
    assert "no [data] here" in out
    assert "training  2/8  valid/loss 0.25  valid/ic 0.05" in out
    assert "2 (1 returned)" in out
    assert "the newest 2 of 6" in run_tasks("list", "pool=pool", "limit=2")
    stat = "2 waiting, 1 running, 1 part_done, 1 done, 1 failed"
    assert run_tasks("stat", "pool=pool").strip() == stat
    assert run_tasks("stat", "pool=other").strip() == "no tasks"


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
def test_queries_select_tasks(run_tasks, words, ids):
    tasks = json.loads(run_tasks("export", "pool=pool", *words))
    assert " ".join(t["_id"] for t in tasks) == ids
    num_tasks = str(len(ids.split()))
    counts = run_tasks("stat", "pool=pool", *words).replace("no tasks", "0 none").split(", ")
    assert sum(int(part.split()[0]) for part in counts) == int(num_tasks)


def test_show(run_tasks, pool):
    out = run_tasks("show", "2", "pool=pool")
    assert "2 (failed)" in out
    assert "no [data] here" in out
    assert '"hidden_size": 8' in out
    assert "run1" in run_tasks("show", "1", "pool=pool")


def test_retry_reset_prioritize_remove(run_tasks, pool):
    def statuses() -> list[str]:
        return [t["status"] for t in pool.query({}, decode=False)]

    assert run_tasks("retry", "pool=pool").strip() == "1 task reset"
    assert statuses()[1] == "waiting"
    assert pool.re_query("2")["errors"] == 0
    assert run_tasks("reset", "pool=pool").strip() == "1 task reset"
    assert statuses()[2:4] == ["waiting", "part_done"]
    assert run_tasks("reset", "pool=pool", "status=part_done").strip() == "1 task reset"
    assert statuses()[3] == "part_done"  # as prepared by the delayed trainer
    assert run_tasks("prioritize", "pool=pool", "priority=5", "seed=2").strip() == (
        "2 tasks have priority 5"
    )
    assert pool.fetch_task()["_id"] == "3"
    assert run_tasks("remove", "pool=pool", "model=gru").strip() == "3 tasks removed"
    assert "all=true" in run_tasks("remove", "pool=pool", code=1)
    assert run_tasks("remove", "pool=pool", "all=true").strip() == "3 tasks removed"


def test_retry_resets_a_prepared_task_to_part_done(run_tasks, pool):
    task = pool.fetch_task(status="part_done")
    pool.fail_task(task, "broken")
    run_tasks("retry", "pool=pool", f"id={task['_id']}")
    assert pool.re_query(task["_id"])["status"] == "part_done"


def test_export(run_tasks, tmp_path):
    output = run_tasks("export", "pool=pool", "out=tasks.csv")
    assert output.strip().endswith("6 tasks saved to {}".format(Path("tasks.csv").absolute()))
    rows = list(csv.DictReader(io.StringIO((tmp_path / "tasks.csv").read_text())))
    assert [(r["id"], r["model"], r["seed"], r["status"]) for r in rows[:2]] == [
        ("1", "LSTM", "0", "done"),
        ("2", "LSTM", "1", "failed"),
    ]
    assert rows[0]["run"] == "run1"
    run_tasks("export", "pool=pool", "out=tasks.json", "seed=0")
    assert [t["_id"] for t in json.loads((tmp_path / "tasks.json").read_text())] == ["1", "4"]
    assert "ends in .json or .csv" in run_tasks("export", "pool=pool", "out=tasks.xls", code=1)


def test_wait_returns_within_a_second_of_the_last_commit(run_tasks, pool):
    assert run_tasks("wait", "pool=pool", "id=1").startswith("1 done after 0.")
    assert "error: task 2: ValueError: no [data] here" in run_tasks(
        "wait", "pool=pool", "id=1,2", code=1
    )
    assert "1 unfinished task of pool 'pool': 5 (waiting)" in run_tasks(
        "wait", "pool=pool", "id=5", "timeout=0.1", code=1
    )
    commit_times = []

    def work() -> None:
        time.sleep(0.3)
        manager = TaskManager("pool")
        manager.commit_task_res(manager.fetch_task({"_id": "5"}), 1)
        commit_times.append(time.monotonic())

    worker = threading.Thread(target=work)
    worker.start()
    run_tasks("wait", "pool=pool", "model=gru", "seed=1")
    assert time.monotonic() - commit_times[0] < 1.0
    worker.join()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lits"], "Did you mean 'list'?"),
        (["stat"], "needs pool=..."),
        (["stat", "pool=pool", "status=faild"], "Did you mean 'failed'?"),
        (["stat", "pool=pool", "failed"], "invalid query"),
        (["stat", "pool=pool", "url=redis://x"], "names no store"),
        (["wait", "pool=pool", "timeout=soon"], "expected a number of seconds"),
        (["show", "pool=pool"], "needs a task ID"),
        (["show", "99", "pool=pool"], "needs a task ID"),
        (["prioritize", "pool=pool"], "needs priority=..."),
    ],
)
def test_wrong_arguments_give_a_one_line_error(run_tasks, words, message):
    err = run_tasks(*words, code=1)
    assert message in err
    assert len([line for line in err.splitlines() if line.startswith("error:")]) == 1


def test_options():
    readers = {"a": parse_count, "b": parse_seconds, "c": parse_bool, "d": str}
    words = ["a=3", "b=0.5", "c=yes", "d=x?y=z", "a=none"]
    assert parse_options(words, readers, "it") == {"a": None, "b": 0.5, "c": True, "d": "x?y=z"}
    for word, message in {
        "a=0": "a whole number from 1",
        "b=-1": "a number of seconds",
        "c=maybe": "true or false",
        "dd=1": "Did you mean 'd'",
    }.items():
        with pytest.raises(ConfigError, match=message):
            parse_options([word], readers, "it")


def test_pool_options_hide_passwords(monkeypatch):
    """Text for other terminals contains no password, and no URL that all of them have in common."""
    url = "postgresql+psycopg://me:secret@db/pool"
    assert pool_options("zoo", url) == "pool=zoo url=postgresql+psycopg://me:***@db/pool"
    monkeypatch.setenv("QTORCH_TASK_URL", url)
    assert pool_options("zoo", url) == "pool=zoo"


def test_durations_and_model_names():
    assert [format_duration(s) for s in (None, 4.21, 185, 3727)] == [
        "-",
        "4.2 s",
        "3:05",
        "1:02:07",
    ]
    network = {"class": "GRU", "module_path": "qtorch.nn"}
    definitions = [
        {"model": {"class": "LightningModel", "kwargs": {"network": network}}},
        {"model": "my.models.Mine"},
        {"model": {"_target_": "my.Other", "network": None}},
        {"model": None},
        "broken",
    ]
    assert [model_name(t) for t in definitions] == ["GRU", "Mine", "Other", "", ""]


def test_live_table(pool):
    task = pool.re_query("3", decode=False)
    busy = SlotStatus("slot 0", "0", task, time.monotonic() - 65, progress=task["progress"])
    busy.progress["samples_per_second"] = 12345
    busy.counts["done"] = 2
    console = Terminal(width=160, file=io.StringIO())
    console.print(worker_table("pool", [busy, SlotStatus("slot 1", "1")]))
    output = console.file.getvalue()
    for text in ("pool pool: 2 done", "LSTM", "training", "2/8", "12,345", "valid/ic 0.05", "1:05"):
        assert text in output
    assert "idle" in output
