"""Print the summary of a run and the table of jobs in a pool."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qtorch.cli.sweep import JobResult
from qtorch.core.errors import LoadObjectError
from qtorch.core.wording import format_count
from qtorch.tracking.r import R
from qtorch.tracking.recorder import Recorder

FIGURES = ("IC", "ICIR", "Rank IC", "Rank ICIR")
SEGMENTS = ("train", "valid", "test")
STATUS_STYLE = {"FINISHED": "green", "FAILED": "red", "KILLED": "yellow"}


def print_summary(result: JobResult, recorder: Recorder, *, show_command: bool = True) -> None:
    """Print data, training, quality by segment, and how to view the run."""
    metrics = result.metrics
    console = terminal()
    facts_table = Table.grid(padding=(0, 2))
    for name, text in _facts(result, recorder):
        facts_table.add_row(f"[dim]{name}[/dim]", text)
    console.print()
    console.print(facts_table)
    quality_table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    quality_table.add_column("segment")
    for figure in FIGURES:
        quality_table.add_column(figure, justify="right")
    for segment in SEGMENTS:
        values = [metrics.get(f"{segment}.{f}") for f in FIGURES]
        if any(v is not None for v in values):
            quality_table.add_row(segment, *(format_number(v) for v in values))
    if quality_table.row_count:
        console.print(quality_table)
    if show_command:
        console.print(f"[dim]view the run:[/dim] {mlflow_command()}", soft_wrap=True)


def _facts(result: JobResult, recorder: Recorder) -> list[tuple[str, str]]:
    metrics, task = result.metrics, recorder.load_object("task")
    fit = _load_optional(recorder, "fit_report")
    facts = _data_facts(task)
    if fit:
        counts = [f"{fit['samples']:,} train", f"{fit['valid_samples']:,} valid"]
        scores = _load_optional(recorder, "pred.pkl")
        counts += [] if scores is None else [f"{len(scores):,} test"]
        facts.append(("samples", ", ".join(counts)))
        best = "" if fit.get("best_epoch") is None else f", best epoch: {fit['best_epoch']}"
        if fit["monitor"] is not None:
            facts.append(
                ("epochs", f"{fit['epochs']}{best} (counting from 0, monitor: {fit['monitor']})")
            )
        facts.append(
            (
                "speed",
                f"{fit['samples_per_second']:,.0f} samples/s during training on {fit['device']}",
            )
        )
    facts.append(("time", f"{result.seconds:.1f} s"))
    long_short = metrics.get("Long-Short Ann Return")
    if long_short is not None:
        sharpe = format_number(metrics.get("Long-Short Ann Sharpe"), 2)
        facts.append(("long-short", f"{long_short:.1%} per year before costs, Sharpe {sharpe}"))
    excess_return = metrics.get("1day.excess_return_with_cost.annualized_return")
    if excess_return is not None:
        ratio = format_number(metrics.get("1day.excess_return_with_cost.information_ratio"), 2)
        facts.append(
            (
                "portfolio",
                f"{excess_return:.1%} per year over the benchmark after costs, "
                f"information ratio {ratio}",
            )
        )
    return [*facts, ("run", f"{result.run_id} (experiment {result.experiment})")]


def _data_facts(task: Any) -> list[tuple[str, str]]:
    """Describe the data source and the segments of a task."""
    dataset = task.get("dataset", {})
    handler = dataset.get("handler") or {}
    source = str((handler.get("source") or {}).get("_target_", "")).rpartition(".")[2]
    spans = [
        f"{name} {str(span[0])[:10]}..{str(span[1])[:10]}"
        for name, span in (dataset.get("segments") or {}).items()
    ]
    return [("data", f"{source}, {handler.get('instruments')}"), ("segments", ", ".join(spans))]


def _load_optional(recorder: Recorder, name: str) -> Any:
    try:
        return recorder.load_object(name)
    except LoadObjectError:
        return None


def print_jobs(jobs: Sequence[JobResult]) -> None:
    """Print one row per job that was submitted to a pool, with its status and test metrics."""
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title=format_count(len(jobs), "job"),
        title_justify="left",
    )
    for name in ("job", "overrides", "status", "run"):
        table.add_column(name, overflow="fold")
    for name in (*FIGURES, "seconds"):
        table.add_column(name, justify="right")
    for job in jobs:
        style = STATUS_STYLE.get(job.status, "")
        values = [job.metrics.get(f"test.{f}", job.metrics.get(f)) for f in FIGURES]
        table.add_row(
            str(job.number),
            escape(" ".join(job.overrides)) or "-",
            f"[{style}]{job.status}[/{style}]" if style else job.status,
            job.run_id or (f"task {job.sent['id']}" if job.sent else "-"),
            *(format_number(v) for v in values),
            f"{job.seconds:.1f}",
        )
    terminal().print(table)


def terminal() -> Console:
    """Create a console; pipes and files get wide lines, because they are searched, not viewed."""
    return Console() if sys.stdout.isatty() else Console(width=160)


def format_number(value: Any, digits: int = 4) -> str:
    """Format a number with fixed digits; a dash for None."""
    return "-" if value is None else f"{float(value):.{digits}f}"


def mlflow_command() -> str:
    """Return the command that opens MLflow's UI on the current store, or the server's address."""
    uri = R.get_uri()
    if uri.startswith(("http://", "https://")):
        return uri
    return f"mlflow server --backend-store-uri {shlex.quote(uri)} --port 5000"
