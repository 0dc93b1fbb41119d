"""Texts and tables of a pool's tasks, for `qtorch tasks` and `qtorch worker`; tasks as CSV."""

from __future__ import annotations

import csv
import io
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.progress import MofNCompleteColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from qtorch.cli.tables.console import format_status, new_table, print_table, terminal
from qtorch.core.errors import format_count
from qtorch.core.terminal import progress_bars
from qtorch.task.definition import RECORDER, Task
from qtorch.task.stores.base import STATUSES
from qtorch.task.worker import SlotStatus

NAME_KEYS = ("_target_", "class", "func")
WORKER_COLUMNS = (
    "slot", "device", "task", "model", "stage", "epoch", "samples/s", "metric", "since",
)  # fmt: skip
CSV_COLUMNS = (
    "id", "status", "model", "seed", "priority", "attempt", "errors", "lost", "preemptions",
    "worker", "run", "experiment_id", "error", "created", "updated",
)  # fmt: skip


# -- texts -----------------------------------------------------------------------------------------


def model_name(definition: Any) -> str:
    """Return the name of the network if the model has one, else of the model."""
    model = definition.get("model") if isinstance(definition, Mapping) else None
    if not isinstance(model, Mapping):
        return _last_part(model)
    options = model if "_target_" in model else model.get("kwargs")
    network = options.get("network") if isinstance(options, Mapping) else None
    return (_config_name(network) if network is not None else "") or _config_name(model)


def task_counts_text(stat: Mapping[str, int]) -> str:
    """Format the numbers of tasks by status: `3 waiting, 40 done`."""
    return ", ".join(f"{stat[s]} {s}" for s in STATUSES if stat.get(s))


def total_counts(slots: Iterable[SlotStatus]) -> Counter[str]:
    """Add up the counts of a worker's slots, by how the tasks ended."""
    totals: Counter[str] = Counter()
    for slot in slots:
        totals.update(slot.counts)
    return totals


def format_duration(seconds: float | None) -> str:
    """Format a duration: `4.2 s`, `3:05`, `1:02:07`."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, whole_seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{whole_seconds:02}" if hours else f"{minutes}:{whole_seconds:02}"


def _config_name(config: Any) -> str:
    if isinstance(config, Mapping):
        return _last_part(next((config[k] for k in NAME_KEYS if config.get(k)), None))
    return _last_part(config)


def _last_part(name: Any) -> str:
    return name.rpartition(".")[2] if isinstance(name, str) else ""


# -- the table of a worker -------------------------------------------------------------------------


def worker_table(pool: str, slots: Sequence[SlotStatus]) -> Table:
    """Create a table with one row per slot, and the total counts in the title."""
    counts = total_counts(slots).items()
    totals = ", ".join(f"{n} {name}" for name, n in counts if n or name == "done")
    title = f"pool {pool}: {totals}"
    table = new_table(*WORKER_COLUMNS, title=title, numbers=("samples/s", "since"))
    for slot in slots:
        table.add_row(slot.name, slot.device, *_cells(slot))
    return table


def _cells(slot: SlotStatus) -> list[str | Text]:
    task, progress = slot.task, slot.progress
    if task is None:
        return ["-", "", Text("idle", style="dim"), "", "", "", ""]
    rate = progress.get("samples_per_second")
    return [
        str(task["_id"]),
        model_name(task["def"]),
        stage_text(progress),
        epoch_text(progress),
        _format_value(rate, ",") if rate else "",
        metrics_text(progress),
        format_duration(time.monotonic() - slot.since),
    ]


def stage_text(progress: Mapping[str, Any]) -> str:
    """Format the stage, with the name of the processor or record if there is one."""
    part = next((str(progress[k]) for k in ("processor", "record") if progress.get(k)), "")
    stage = str(progress.get("stage", ""))
    return f"{stage} {part}" if part and stage in ("processors", "record") else stage


def epoch_text(progress: Mapping[str, Any]) -> str:
    """Format the epoch and batch of a training."""
    if progress.get("epoch") is None:
        return ""
    batches = f" {progress['batch']}/{progress['batches']}" if progress.get("batches") else ""
    return f"{progress['epoch']}/{progress.get('epochs')}{batches}"


def metrics_text(progress: Mapping[str, Any]) -> str:
    """Format the last epoch's validation metrics, or the training metrics if there are none."""
    metrics = progress.get("metrics")
    if not isinstance(metrics, Mapping):
        return ""
    names = [n for n in metrics if n.startswith("valid/")] or list(metrics)
    texts = {n: _format_value(metrics[n], ".4g") for n in names[:2] if metrics[n] is not None}
    return "  ".join(f"{name} {text}" for name, text in texts.items())


def _format_value(value: Any, form: str) -> str:
    """Format a number; a task may report other values too."""
    try:
        return format(value, form)
    except (TypeError, ValueError, OverflowError):
        return str(value)


# -- the tasks of a pool ---------------------------------------------------------------------------


def print_tasks(tasks: Sequence[Task], limit: int | None = None) -> None:
    """Print one row per task."""
    columns = ("id", "status", "model", "seed", "run", "attempts", "activity", "since")
    table = new_table(*columns, numbers=("since",))
    now = time.time()
    for task in tasks if limit is None else tasks[-limit:]:
        seed = task["def"].get("seed") if isinstance(task["def"], Mapping) else None
        table.add_row(
            str(task["_id"]),
            format_status(task["status"]),
            model_name(task["def"]) or "-",
            "-" if seed is None else str(seed),
            task_run_id(task) or "-",
            attempts_text(task),
            _activity_text(task),
            format_duration(max(0.0, now - float(task["updated"]))) if task.get("updated") else "-",
        )
    print_table(table)
    if limit is not None and len(tasks) > limit:
        print(f"showing the newest {limit} of {len(tasks)} tasks")


def print_task(task: Task) -> None:
    """Print all details of a task."""
    console = terminal()
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
            lines.add_row(Text(name, style="dim"), str(value))
    console.print(lines)
    for name in ("traceback", "progress", "def", "res"):
        value = task.get(name)
        if value:
            console.print(Text(name, style="dim"))
            text = value if isinstance(value, str) else json.dumps(value, indent=1)
            console.print(text, highlight=False)


def attempts_text(task: Mapping[str, Any]) -> str:
    """Format the number of attempts, and how many ended in errors or were lost or returned."""
    texts = {
        "errors": format_count(task["errors"], "error"),
        "lost": f"{task['lost']} lost",
        "preemptions": f"{task['preemptions']} returned",
    }
    details = ", ".join(text for count, text in texts.items() if task[count])
    return f"{task['attempt']} ({details})" if details else str(task["attempt"])


def task_run_id(task: Mapping[str, Any]) -> str:
    """Return the ID of the task's run."""
    result = task.get("res")
    recorder = result.get(RECORDER) if isinstance(result, Mapping) else None
    run = recorder if isinstance(recorder, Mapping) else task.get("run")
    return str((run or {}).get("recorder_id") or "")


def _activity_text(task: Mapping[str, Any]) -> str:
    if task["status"] in ("failed", "waiting", "part_done"):
        return str(task.get("error") or "")[:200]
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
        yield lambda stat: print(task_counts_text(stat), file=sys.stderr, flush=True)
        return
    with progress_bars(MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()) as bars:
        bar = bars.add_task(pool, total=None)

        def update(stat: Mapping[str, int]) -> None:
            num_finished = stat.get("done", 0) + stat.get("failed", 0)
            failed_text = f", {stat['failed']} failed" if stat.get("failed") else ""
            running_text = f", {stat['running']} running" if stat.get("running") else ""
            bars.update(
                bar,
                completed=num_finished,
                total=sum(stat.values()),
                description=f"{pool}{running_text}{failed_text}",
            )

        yield update
