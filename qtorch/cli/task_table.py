"""Tasks of a pool on the screen and as CSV."""

from __future__ import annotations

import csv
import io
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from qtorch.cli.task_text import counts_text, duration, model_of
from qtorch.cli.worker_table import doing, epoch_of, metric_of
from qtorch.task.definition import RECORDER, Task

STYLE = {"done": "green", "failed": "red", "running": "cyan"}
CSV_COLUMNS = (
    "id", "status", "model", "seed", "priority", "attempt", "errors", "lost", "preemptions",
    "worker", "run", "experiment_id", "error", "created", "updated",
)  # fmt: skip


def print_tasks(tasks: Sequence[Task], limit: int | None = None) -> None:
    """One row a task."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("id", "status", "model", "seed", "run", "attempts", "what it is at", "since"):
        table.add_column(name, overflow="fold", justify="right" if name == "since" else "left")
    now = time.time()
    for task in tasks if limit is None else tasks[-limit:]:
        style = STYLE.get(task["status"], "")
        status = f"[{style}]{task['status']}[/{style}]" if style else task["status"]
        seed = task["def"].get("seed") if isinstance(task["def"], Mapping) else None
        table.add_row(
            str(task["_id"]),
            status,
            model_of(task["def"]) or "-",
            "-" if seed is None else str(seed),
            run_of(task) or "-",
            attempts_text(task),
            _at(task),
            duration(max(0.0, now - float(task["updated"]))) if task.get("updated") else "-",
        )
    _console().print(table)
    if limit is not None and len(tasks) > limit:
        print(f"the newest {limit} of {len(tasks)}")


def print_task(task: Task) -> None:
    """All that is known of a task."""
    console = _console()
    lines = Table.grid(padding=(0, 2))
    worker = task.get("worker") or {}
    facts = {
        "task": f"{task['_id']} ({task['status']})",
        "model": model_of(task["def"]),
        "run": run_of(task),
        "attempts": attempts_text(task),
        "worker": " ".join(str(worker[k]) for k in ("host", "pid") if k in worker),
        "at": _at(task) if task["status"] != "failed" else "",
        "error": task.get("error"),
    }
    for name, value in facts.items():
        if value:
            lines.add_row(f"[dim]{name}[/dim]", str(value).replace("[", r"\["))
    console.print(lines)
    for name in ("traceback", "progress", "def", "res"):
        value = task.get(name)
        if value:
            console.print(f"[dim]{name}[/dim]")
            text = value if isinstance(value, str) else json.dumps(value, indent=1)
            console.print(text, markup=False, highlight=False)


def attempts_text(task: Mapping[str, Any]) -> str:
    """How often it was taken, and what came of that."""
    counts = [(task["errors"], "errors"), (task["lost"], "lost"), (task["preemptions"], "returned")]
    told = ", ".join(f"{n} {what}" for n, what in counts if n)
    return f"{task['attempt']} ({told})" if told else str(task["attempt"])


def run_of(task: Mapping[str, Any]) -> str:
    """The id of the task's run."""
    result = task.get("res")
    found = result.get(RECORDER) if isinstance(result, Mapping) else None
    return str((found or task.get("run") or {}).get("recorder_id") or "")


def _at(task: Mapping[str, Any]) -> str:
    if task["status"] in ("failed", "waiting", "part_done"):
        return str(task.get("error") or "")[:200].replace("[", r"\[")
    progress = task.get("progress") or {}
    if task["status"] == "done":
        return metric_of(progress)
    host = (task.get("worker") or {}).get("host", "")
    parts = (doing(progress), epoch_of(progress), metric_of(progress), f"on {host}" if host else "")
    return "  ".join(p for p in parts if p)


def csv_text(tasks: Sequence[Task]) -> str:
    """The tasks as CSV, without definitions."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for task in tasks:
        definition = task["def"] if isinstance(task["def"], Mapping) else {}
        own = {
            "id": task["_id"],
            "model": model_of(definition),
            "seed": definition.get("seed"),
            "worker": (task.get("worker") or {}).get("id"),
            "run": run_of(task),
            "experiment_id": (task.get("run") or {}).get("experiment_id"),
        }
        writer.writerow([own[c] if c in own else task.get(c) for c in CSV_COLUMNS])
    return out.getvalue()


@contextmanager
def progress_shown(pool: str) -> Iterator[Callable[[Mapping[str, int]], None]]:
    """A function that shows counts: on a terminal a bar with the remaining time, else lines."""
    if not sys.stderr.isatty():
        yield lambda stat: print(counts_text(stat), file=sys.stderr, flush=True)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        bar = bars.add_task(pool, total=None)

        def show(stat: Mapping[str, int]) -> None:
            finished = stat.get("done", 0) + stat.get("failed", 0)
            failed = f", [red]{stat['failed']} failed[/red]" if stat.get("failed") else ""
            running = f", {stat['running']} running" if stat.get("running") else ""
            bars.update(
                bar,
                completed=finished,
                total=sum(stat.values()),
                description=f"{pool}{running}{failed}",
            )

        yield show


def _console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=160)
