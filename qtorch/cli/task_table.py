"""Print the tasks of a pool, and convert them to CSV."""

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

from qtorch.cli.task_text import counts_text, format_duration, model_name
from qtorch.cli.worker_table import epoch_text, metrics_text, stage_text
from qtorch.task.definition import RECORDER, Task

STYLE = {"done": "green", "failed": "red", "running": "cyan"}
CSV_COLUMNS = (
    "id", "status", "model", "seed", "priority", "attempt", "errors", "lost", "preemptions",
    "worker", "run", "experiment_id", "error", "created", "updated",
)  # fmt: skip


def print_tasks(tasks: Sequence[Task], limit: int | None = None) -> None:
    """Print one row per task."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("id", "status", "model", "seed", "run", "attempts", "activity", "since"):
        table.add_column(name, overflow="fold", justify="right" if name == "since" else "left")
    now = time.time()
    for task in tasks if limit is None else tasks[-limit:]:
        style = STYLE.get(task["status"], "")
        status = f"[{style}]{task['status']}[/{style}]" if style else task["status"]
        seed = task["def"].get("seed") if isinstance(task["def"], Mapping) else None
        table.add_row(
            str(task["_id"]),
            status,
            model_name(task["def"]) or "-",
            "-" if seed is None else str(seed),
            task_run_id(task) or "-",
            attempts_text(task),
            _activity_text(task),
            format_duration(max(0.0, now - float(task["updated"]))) if task.get("updated") else "-",
        )
    _console().print(table)
    if limit is not None and len(tasks) > limit:
        print(f"showing the newest {limit} of {len(tasks)} tasks")


def print_task(task: Task) -> None:
    """Print all details of a task."""
    console = _console()
    lines = Table.grid(padding=(0, 2))
    worker = task.get("worker") or {}
    facts = {
        "task": f"{task['_id']} ({task['status']})",
        "model": model_name(task["def"]),
        "run": task_run_id(task),
        "attempts": attempts_text(task),
        "worker": " ".join(str(worker[k]) for k in ("host", "pid") if k in worker),
        "activity": _activity_text(task) if task["status"] != "failed" else "",
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
    """Format the number of attempts, and how many ended in errors or were lost or returned."""
    counts = [(task["errors"], "errors"), (task["lost"], "lost"), (task["preemptions"], "returned")]
    details = ", ".join(f"{n} {name}" for n, name in counts if n)
    return f"{task['attempt']} ({details})" if details else str(task["attempt"])


def task_run_id(task: Mapping[str, Any]) -> str:
    """Return the ID of the task's run."""
    result = task.get("res")
    recorder = result.get(RECORDER) if isinstance(result, Mapping) else None
    return str((recorder or task.get("run") or {}).get("recorder_id") or "")


def _activity_text(task: Mapping[str, Any]) -> str:
    if task["status"] in ("failed", "waiting", "part_done"):
        return str(task.get("error") or "")[:200].replace("[", r"\[")
    progress = task.get("progress") or {}
    if task["status"] == "done":
        return metrics_text(progress)
    host = (task.get("worker") or {}).get("host", "")
    parts = (
        stage_text(progress),
        epoch_text(progress),
        metrics_text(progress),
        f"on {host}" if host else "",
    )
    return "  ".join(p for p in parts if p)


def csv_text(tasks: Sequence[Task]) -> str:
    """Format the tasks as CSV, without their definitions."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for task in tasks:
        definition = task["def"] if isinstance(task["def"], Mapping) else {}
        values = {
            "id": task["_id"],
            "model": model_name(definition),
            "seed": definition.get("seed"),
            "worker": (task.get("worker") or {}).get("id"),
            "run": task_run_id(task),
            "experiment_id": (task.get("run") or {}).get("experiment_id"),
        }
        writer.writerow([values[c] if c in values else task.get(c) for c in CSV_COLUMNS])
    return out.getvalue()


@contextmanager
def show_progress(pool: str) -> Iterator[Callable[[Mapping[str, int]], None]]:
    """Yield a function that displays counts: a progress bar on a terminal, otherwise lines."""
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

        def update(stat: Mapping[str, int]) -> None:
            num_finished = stat.get("done", 0) + stat.get("failed", 0)
            failed_text = f", [red]{stat['failed']} failed[/red]" if stat.get("failed") else ""
            running_text = f", {stat['running']} running" if stat.get("running") else ""
            bars.update(
                bar,
                completed=num_finished,
                total=sum(stat.values()),
                description=f"{pool}{running_text}{failed_text}",
            )

        yield update


def _console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=160)
