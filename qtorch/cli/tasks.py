"""`qtorch tasks`: inspect and repair a task pool."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from qtorch.cli.guard import configure_process, handle_stop_signals
from qtorch.cli.options import (
    parse_bool,
    parse_count,
    parse_known_options,
    parse_seconds,
    require_option,
)
from qtorch.cli.tables import tasks as task_tables
from qtorch.cli.tables.tasks import model_name, task_counts_text
from qtorch.core.errors import ConfigError, format_count, printable_text, unknown_name_message
from qtorch.core.session import resolve_path
from qtorch.task.definition import Task
from qtorch.task.manager import TaskManager
from qtorch.task.stores.base import STATUSES, URL_FORMS

USAGE = f"""\
qtorch tasks: inspect and repair a task pool

usage: qtorch tasks ACTION pool=NAME [url=URL] [QUERY ...]

  list         list the tasks                   stat        count the tasks by status
  show ID      show all details of a task       wait        wait until done; timeout=SECONDS
  retry        reset failed tasks               reset       reset running ones too (or status=...)
  prioritize   set priority=N                   remove      delete tasks (all=true for all)
  export       write out=FILE (.json, .csv), or print JSON

A QUERY is id=3,5  status=failed,waiting  model=lstm  seed=3, or a key of the task's definition such
as dataset.step_len=20; a task must match all of them. Without a query, an action applies to the
whole pool. `qtorch tasks list` without a pool lists the pools.

  url      {URL_FORMS};
           default: QTORCH_TASK_URL, else mlruns/tasks.db in this folder
"""
PARSERS: dict[str, Callable[[str], Any]] = {
    "pool": str,
    "url": str,
    "timeout": parse_seconds,
    "priority": int,
    "out": str,
    "all": parse_bool,
    "limit": parse_count,
}
TASK_COLUMNS = ("id", "_id", "status", "model")  # keys of a query; others are of the definition
CHUNK_SIZE = 500  # IDs per query: stores limit the length of a statement


def main(argv: Sequence[str]) -> int:
    """Run one action; `wait` returns 1 if a task failed."""
    configure_process("WARNING")
    name, *words = argv
    if name not in ACTIONS:
        raise ConfigError(unknown_name_message("action of qtorch tasks", name, ACTIONS))
    options, query_words = parse_known_options(words, PARSERS)
    if name == "show" and query_words and "=" not in query_words[0]:
        query_words[0] = f"id={query_words[0]}"
    if name == "list" and options.get("pool") is None and not query_words:
        pools = TaskManager.list(options.get("url"))
        print(printable_text("\n".join(pools)) if pools else "no pools yet.")
        return 0
    pool = require_option(options, "pool", f"qtorch tasks {name}")
    return ACTIONS[name](TaskManager(pool, options.get("url"), patience=30.0), query_words, options)


def _list(manager: TaskManager, words: Sequence[str], options: dict[str, Any]) -> int:
    tasks = select_tasks(manager, words)
    task_tables.print_tasks(tasks, options.get("limit"))
    return 0


def _stat(manager: TaskManager, words: Sequence[str], options: dict[str, Any]) -> int:
    query = store_query(words)
    if query is not None:
        stat = manager.task_stat(query)
    else:
        tasks = select_tasks(manager, words)
        stat = {s: n for s in STATUSES if (n := sum(t["status"] == s for t in tasks))}
    print(task_counts_text(stat) or "no tasks")
    return 0


def _show(manager: TaskManager, words: Sequence[str], options: dict[str, Any]) -> int:
    tasks = select_tasks(manager, words)
    if not words or not tasks:
        raise ConfigError("qtorch tasks show needs a task ID: qtorch tasks show 12 pool=...")
    for task in tasks:
        task_tables.print_task(task)
    return 0


def _wait(manager: TaskManager, words: Sequence[str], options: dict[str, Any]) -> int:
    query = store_query(words)
    if query is None:
        query = _ids_query(select_tasks(manager, words))
    with handle_stop_signals(), task_tables.show_progress(manager.task_pool) as on_progress:
        start = time.monotonic()
        stat = manager.wait(query, timeout=options.get("timeout"), on_progress=on_progress)
    print(f"{task_counts_text(stat) or 'no tasks'} after {time.monotonic() - start:.1f} s")
    for task in stat.failed_tasks:
        print(f"error: task {task['_id']}: {printable_text(task['error'] or '')}", file=sys.stderr)
    return int(bool(stat.failed_tasks))


def _reset(
    manager: TaskManager, words: Sequence[str], options: dict[str, Any], *, statuses: str
) -> int:
    """Reset tasks, by default those with one of the statuses, so that they run again.

    A task that a delayed trainer had prepared goes back to part_done, others to waiting.
    """
    if not any(w.startswith("status=") for w in words):
        words = [f"status={statuses}", *words]
    tasks_by_status: dict[str, list[Task]] = {"waiting": [], "part_done": []}
    for task in select_tasks(manager, words):
        is_prepared = task["res"] is not None and task["status"] != "done"
        tasks_by_status["part_done" if is_prepared else "waiting"].append(task)
    num_reset = sum(
        manager.reset_status(query, status)
        for status, tasks in tasks_by_status.items()
        for query in _chunks(tasks)
    )
    print(format_count(num_reset, "task reset", "tasks reset"))
    return 0


def _prioritize(manager: TaskManager, words: Sequence[str], options: dict[str, Any]) -> int:
    priority = require_option(options, "priority", "qtorch tasks prioritize")
    tasks = select_tasks(manager, words)
    for task in tasks:
        manager.prioritize(task, priority)
    print(format_count(len(tasks), "task has", "tasks have"), f"priority {priority}")
    return 0


def _remove(manager: TaskManager, words: Sequence[str], options: dict[str, Any]) -> int:
    if not words and not options.get("all"):
        raise ConfigError(
            "remove without a query would delete every task of the pool: confirm with all=true, "
            "or add a query (status=failed, id=3,5, model=lstm)."
        )
    num_removed = sum(manager.remove(query) for query in _chunks(select_tasks(manager, words)))
    print(format_count(num_removed, "task removed", "tasks removed"))
    return 0


def _export(manager: TaskManager, words: Sequence[str], options: dict[str, Any]) -> int:
    out = options.get("out")
    if out is not None and Path(out).suffix not in (".json", ".csv"):
        raise ConfigError(f"out={out}: expected a name that ends in .json or .csv.")
    tasks = select_tasks(manager, words)
    if out is None:
        print(json.dumps(tasks, indent=1))
        return 0
    path = resolve_path(out)
    is_csv = path.suffix == ".csv"
    text = task_tables.csv_text(tasks) if is_csv else json.dumps(tasks, indent=1)
    path.write_text(text, errors="backslashreplace")  # the definitions may contain any text
    print(format_count(len(tasks), "task"), f"saved to {path}")
    return 0


def _chunks(tasks: Sequence[Task]) -> list[dict[str, Any]]:
    return [_ids_query(tasks[k : k + CHUNK_SIZE]) for k in range(0, len(tasks), CHUNK_SIZE)]


def _ids_query(tasks: Sequence[Task]) -> dict[str, Any]:
    return {"_id": {"$in": [t["_id"] for t in tasks]}}


# -- queries ---------------------------------------------------------------------------------------


def select_tasks(manager: TaskManager, words: Sequence[str]) -> list[Task]:
    """Return the tasks that match a query, oldest first, with results as they are stored."""
    query, models = _parse_query(words)
    tasks = manager.query(query, decode=False)
    return [t for t in tasks if not models or model_name(t["def"]).lower() in models]


def store_query(words: Sequence[str]) -> dict[str, Any] | None:
    """Translate the words to a store query; None if the store cannot evaluate it (model=...)."""
    query, models = _parse_query(words)
    return None if models else query


def _parse_query(words: Sequence[str]) -> tuple[dict[str, Any], set[str]]:
    """Return the store's query, and the requested models in lower case."""
    query: dict[str, Any] = {}
    models: set[str] = set()
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise ConfigError(
                f"invalid query {word!r}; expected KEY=VALUE such as status=failed, "
                "id=3,5, model=lstm or seed=3."
            )
        if key == "model":
            models |= {m.strip().lower() for m in text.split(",")}
        elif key in TASK_COLUMNS:
            values = [v.strip() for v in text.split(",")]
            query["_id" if key in ("id", "_id") else key] = {"$in": values}
        else:
            query[key] = {"$in": _possible_values(text)}
    return query, models


def _possible_values(text: str) -> list[Any]:
    """Return the possible values of a text: itself, its JSON value, and those of a list `a,b`."""
    possible_values: list[Any] = []
    for part in [text, *(text.split(",") if text[:1] not in ("[", "{", '"') else [])]:
        for value in (part, _parse_json(part)):
            if not any(type(value) is type(m) and value == m for m in possible_values):
                possible_values.append(value)
    return possible_values


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


ACTIONS: dict[str, Callable[[TaskManager, Sequence[str], dict[str, Any]], int]] = {
    "list": _list,
    "stat": _stat,
    "show": _show,
    "wait": _wait,
    "retry": partial(_reset, statuses="failed"),
    "reset": partial(_reset, statuses="running,failed"),
    "prioritize": _prioritize,
    "remove": _remove,
    "export": _export,
}
