"""`qtorch tasks`: look at a task pool and mend it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qtorch.cli import task_table
from qtorch.cli.options import count, known_options, needed, seconds, switch
from qtorch.cli.signals import interruptible
from qtorch.cli.task_query import chosen_tasks, store_query
from qtorch.cli.task_text import counts_text
from qtorch.core.errors import ConfigError, unknown_name
from qtorch.core.runtime import configure_logging
from qtorch.core.wording import counted
from qtorch.task.definition import Task
from qtorch.task.manager import TaskManager
from qtorch.task.query import STATUSES

USAGE = """\
qtorch tasks: look at a task pool and mend it

usage: qtorch tasks ACTION pool=NAME [url=URL] [QUERY ...]

  list         the tasks, one a line            stat        how many have which status
  show ID      all that is known of one         wait        until they are done; timeout=SECONDS
  retry        failed tasks wait again          reset       running ones too (status=... others)
  prioritize   priority=N                       remove      delete them (all=true for every task)
  export       out=FILE (.json, .csv), else JSON on the screen

A query is any of: id=3,5  status=failed,waiting  model=lstm  seed=3, or a path of the definition
such as dataset.step_len=20; several must all hold. Without one an action is for the whole pool.
`qtorch tasks list` without a pool lists the pools.

  url      sqlite:///FILE, postgresql+psycopg://..., mongodb://...; by default QTORCH_TASK_URL,
           else mlruns/tasks.db in this folder
"""
READERS: dict[str, Callable[[str], Any]] = {
    "pool": str,
    "url": str,
    "timeout": seconds,
    "priority": int,
    "out": str,
    "all": switch,
    "limit": count,
}
CHUNK = 500  # ids of one query: stores limit the length of a statement


def main(argv: Sequence[str]) -> int:
    """Do one action; `wait` is 1 where a task failed."""
    if not argv or any(a in ("-h", "--help") for a in argv):
        print(USAGE)
        return 0 if argv else 2
    configure_logging("WARNING")
    name, *words = argv
    if name not in ACTIONS:
        raise ConfigError(unknown_name("action of qtorch tasks", name, ACTIONS))
    options, rest = known_options(words, READERS)
    if name == "show" and rest and "=" not in rest[0]:
        rest[0] = f"id={rest[0]}"
    if name == "list" and options.get("pool") is None and not rest:
        pools = TaskManager.list(options.get("url"))
        print("\n".join(pools) if pools else "there is no pool yet.")
        return 0
    pool = needed(options, "pool", f"qtorch tasks {name}")
    return ACTIONS[name](TaskManager(pool, options.get("url"), patience=30.0), rest, options)


def _list(manager: TaskManager, words: Sequence[str], options: dict[str, Any]) -> int:
    tasks = chosen_tasks(manager, words)
    task_table.print_tasks(tasks, options.get("limit"))
    return 0


def _stat(manager: TaskManager, words: Sequence[str], options: dict[str, Any]) -> int:
    query = store_query(words)
    if query is not None:
        stat = manager.task_stat(query)
    else:
        tasks = chosen_tasks(manager, words)
        stat = {s: n for s in STATUSES if (n := sum(t["status"] == s for t in tasks))}
    print(counts_text(stat) or "no task")
    return 0


def _show(manager: TaskManager, words: Sequence[str], options: dict[str, Any]) -> int:
    tasks = chosen_tasks(manager, words)
    if not words or not tasks:
        raise ConfigError("qtorch tasks show takes the id of a task: qtorch tasks show 12 pool=...")
    for task in tasks:
        task_table.print_task(task)
    return 0


def _wait(manager: TaskManager, words: Sequence[str], options: dict[str, Any]) -> int:
    query = store_query(words)
    if query is None:
        query = _of_ids(chosen_tasks(manager, words))
    with interruptible(), task_table.progress_shown(manager.task_pool) as on_progress:
        begin = time.monotonic()
        stat = manager.wait(query, timeout=options.get("timeout"), on_progress=on_progress)
    print(f"{counts_text(stat) or 'no task'} after {time.monotonic() - begin:.1f} s")
    for task in stat.failed:
        print(f"error: task {task['_id']}: {task['error']}", file=sys.stderr)
    return int(bool(stat.failed))


def _retry(manager: TaskManager, words: Sequence[str], options: dict[str, Any]) -> int:
    return _back(manager, _with_status(words, "failed"))


def _reset(manager: TaskManager, words: Sequence[str], options: dict[str, Any]) -> int:
    return _back(manager, _with_status(words, "running,failed"))


def _with_status(words: Sequence[str], status: str) -> list[str]:
    named = any(w.partition("=")[0] == "status" for w in words)
    return list(words) if named else [f"status={status}", *words]


def _back(manager: TaskManager, words: Sequence[str]) -> int:
    """Let tasks wait again; what a delayed trainer has begun goes back to where that left it."""
    tasks = chosen_tasks(manager, words)
    done = 0
    for status in ("waiting", "part_done"):
        begun = status == "part_done"
        part = [t for t in tasks if (t["res"] is not None and t["status"] != "done") is begun]
        for query in _chunks(part):
            done += manager.reset_status(query, status)
    print(counted(done, "task waits again", "tasks wait again"))
    return 0


def _prioritize(manager: TaskManager, words: Sequence[str], options: dict[str, Any]) -> int:
    priority = needed(options, "priority", "qtorch tasks prioritize")
    tasks = chosen_tasks(manager, words)
    for task in tasks:
        manager.prioritize(task, priority)
    print(counted(len(tasks), "task has", "tasks have"), f"priority {priority}")
    return 0


def _remove(manager: TaskManager, words: Sequence[str], options: dict[str, Any]) -> int:
    if not words and not options.get("all"):
        raise ConfigError(
            "remove without a query would delete every task of the pool: say all=true, or which "
            "(status=failed, id=3,5, model=lstm)."
        )
    done = sum(manager.remove(query) for query in _chunks(chosen_tasks(manager, words)))
    print(counted(done, "task is removed", "tasks are removed"))
    return 0


def _export(manager: TaskManager, words: Sequence[str], options: dict[str, Any]) -> int:
    out = options.get("out")
    if out is not None and Path(out).suffix not in (".json", ".csv"):
        raise ConfigError(f"out={out}: expected a name that ends in .json or .csv.")
    tasks = chosen_tasks(manager, words)
    if out is None:
        print(json.dumps(tasks, indent=1))
        return 0
    path = Path(out).expanduser()
    if path.suffix == ".csv":
        path.write_text(task_table.csv_text(tasks))
    else:
        path.write_text(json.dumps(tasks, indent=1))
    print(counted(len(tasks), "task"), f"in {path}")
    return 0


def _chunks(tasks: Sequence[Task]) -> list[dict[str, Any]]:
    return [_of_ids(tasks[k : k + CHUNK]) for k in range(0, len(tasks), CHUNK)]


def _of_ids(tasks: Sequence[Task]) -> dict[str, Any]:
    return {"_id": {"$in": [t["_id"] for t in tasks]}}


ACTIONS: dict[str, Callable[[TaskManager, Sequence[str], dict[str, Any]], int]] = {
    "list": _list,
    "stat": _stat,
    "show": _show,
    "wait": _wait,
    "retry": _retry,
    "reset": _reset,
    "prioritize": _prioritize,
    "remove": _remove,
    "export": _export,
}
