"""Display the activity of a worker's slots as a table."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from qtorch.cli.task_text import format_duration, model_name, total_counts
from qtorch.task.slot import SlotStatus

COLUMNS = ("slot", "device", "task", "model", "stage", "epoch", "samples/s", "metric", "since")


def worker_table(pool: str, slots: Sequence[SlotStatus]) -> Table:
    """Create a table with one row per slot, and the total counts in the title."""
    counts = total_counts(slots)
    counts_text = ", ".join(f"{n} {name}" for name, n in counts.items() if n or name == "done")
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title=f"pool {pool}: {counts_text}",
        title_justify="left",
    )
    for name in COLUMNS:
        table.add_column(name, justify="right" if name in ("samples/s", "since") else "left")
    for slot in slots:
        table.add_row(slot.name, slot.device, *_cells(slot))
    return table


def _cells(slot: SlotStatus) -> list[str]:
    task, progress = slot.task, slot.progress
    if task is None:
        return ["-", "", "[dim]idle[/dim]", "", "", "", ""]
    rate = progress.get("samples_per_second")
    return [
        str(task["_id"]),
        model_name(task["def"]),
        stage_text(progress),
        epoch_text(progress),
        f"{rate:,}" if rate else "",
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
    metrics = progress.get("metrics") or {}
    names = [n for n in metrics if n.startswith("valid/")] or list(metrics)
    return "  ".join(f"{n} {metrics[n]:.4g}" for n in names[:2] if metrics[n] is not None)
