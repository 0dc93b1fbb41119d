"""What a worker's places are doing, as a table."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from qtorch.cli.task_text import counts_of, duration, model_of
from qtorch.task.slot import View

COLUMNS = ("place", "device", "task", "model", "doing", "epoch", "samples/s", "metric", "since")


def worker_table(pool: str, views: Sequence[View]) -> Table:
    """One row a place; the counts of all of them in the title."""
    counts = counts_of(views)
    told = ", ".join(f"{n} {name}" for name, n in counts.items() if n or name == "done")
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, title=f"pool {pool}: {told}", title_justify="left"
    )
    for name in COLUMNS:
        table.add_column(name, justify="right" if name in ("samples/s", "since") else "left")
    for view in views:
        table.add_row(view.name, view.device, *_cells(view))
    return table


def _cells(view: View) -> list[str]:
    task, progress = view.task, view.progress
    if task is None:
        return ["-", "", "[dim]idle[/dim]", "", "", "", ""]
    rate = progress.get("samples_per_second")
    return [
        str(task["_id"]),
        model_of(task["def"]),
        doing(progress),
        epoch_of(progress),
        f"{rate:,}" if rate else "",
        metric_of(progress),
        duration(time.monotonic() - view.since),
    ]


def doing(progress: Mapping[str, Any]) -> str:
    """The stage, and its part where it names one."""
    part = next((str(progress[k]) for k in ("processor", "record") if progress.get(k)), "")
    stage = str(progress.get("stage", ""))
    return f"{stage} {part}" if part and stage in ("processors", "record") else stage


def epoch_of(progress: Mapping[str, Any]) -> str:
    """Epoch and batch of a training."""
    if progress.get("epoch") is None:
        return ""
    batches = f" {progress['batch']}/{progress['batches']}" if progress.get("batches") else ""
    return f"{progress['epoch']}/{progress.get('epochs')}{batches}"


def metric_of(progress: Mapping[str, Any]) -> str:
    """What the last epoch's validation gave, else its training."""
    metrics = progress.get("metrics") or {}
    names = [n for n in metrics if n.startswith("valid/")] or list(metrics)
    return "  ".join(f"{n} {metrics[n]:.4g}" for n in names[:2] if metrics[n] is not None)
