"""What a command says at its end: the summary of a run, the table of a sweep."""

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
from qtorch.core.wording import counted
from qtorch.tracking.r import R
from qtorch.tracking.recorder import Recorder

FIGURES = ("IC", "ICIR", "Rank IC", "Rank ICIR")
SEGMENTS = ("train", "valid", "test")
STATUS_STYLE = {"FINISHED": "green", "FAILED": "red", "KILLED": "yellow"}


def print_summary(result: JobResult, recorder: Recorder, *, look: bool = True) -> None:
    """The data, the training, the quality by segment, and where to look further."""
    metrics = result.metrics
    console = terminal()
    lines = Table.grid(padding=(0, 2))
    for name, text in _facts(result, recorder):
        lines.add_row(f"[dim]{name}[/dim]", text)
    console.print()
    console.print(lines)
    quality = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    quality.add_column("segment")
    for figure in FIGURES:
        quality.add_column(figure, justify="right")
    for segment in SEGMENTS:
        values = [metrics.get(f"{segment}.{f}") for f in FIGURES]
        if any(v is not None for v in values):
            quality.add_row(segment, *(number(v) for v in values))
    if quality.row_count:
        console.print(quality)
    if look:
        console.print(f"[dim]look at it:[/dim] {page_command()}", soft_wrap=True)


def _facts(result: JobResult, recorder: Recorder) -> list[tuple[str, str]]:
    metrics, task = result.metrics, recorder.load_object("task")
    fit = _stored(recorder, "fit_report")
    facts = _data(task)
    if fit:
        counts = [f"{fit['samples']:,} train", f"{fit['valid_samples']:,} valid"]
        scores = _stored(recorder, "pred.pkl")
        counts += [] if scores is None else [f"{len(scores):,} test"]
        facts.append(("samples", ", ".join(counts)))
        best = "" if fit.get("best_epoch") is None else f", the best is number {fit['best_epoch']}"
        if fit["monitor"] is not None:
            facts.append(("epochs", f"{fit['epochs']}{best} (counted from 0, by {fit['monitor']})"))
        facts.append(
            ("speed", f"{fit['samples_per_second']:,.0f} samples/s in training on {fit['device']}")
        )
    facts.append(("time", f"{result.seconds:.1f} s"))
    long_short = metrics.get("Long-Short Ann Return")
    if long_short is not None:
        sharpe = number(metrics.get("Long-Short Ann Sharpe"), 2)
        facts.append(("long-short", f"{long_short:.1%} a year before costs, Sharpe {sharpe}"))
    held = metrics.get("1day.excess_return_with_cost.annualized_return")
    if held is not None:
        ratio = number(metrics.get("1day.excess_return_with_cost.information_ratio"), 2)
        facts.append(
            ("portfolio", f"{held:.1%} a year over the benchmark after costs, ratio {ratio}")
        )
    return [*facts, ("run", f"{result.run_id} (experiment {result.experiment})")]


def _data(task: Any) -> list[tuple[str, str]]:
    """The source and the segments of a task, as far as it says."""
    dataset = task.get("dataset", {})
    handler = dataset.get("handler") or {}
    source = str((handler.get("source") or {}).get("_target_", "")).rpartition(".")[2]
    spans = [
        f"{name} {str(span[0])[:10]}..{str(span[1])[:10]}"
        for name, span in (dataset.get("segments") or {}).items()
    ]
    return [("data", f"{source}, {handler.get('instruments')}"), ("segments", ", ".join(spans))]


def _stored(recorder: Recorder, name: str) -> Any:
    try:
        return recorder.load_object(name)
    except LoadObjectError:
        return None


def print_jobs(jobs: Sequence[JobResult]) -> None:
    """One row a job that was sent to a pool: how it ended, its test figures."""
    shown = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, title=counted(len(jobs), "job"), title_justify="left"
    )
    for name in ("job", "overrides", "status", "run"):
        shown.add_column(name, overflow="fold")
    for name in (*FIGURES, "seconds"):
        shown.add_column(name, justify="right")
    for job in jobs:
        style = STATUS_STYLE.get(job.status, "")
        values = [job.metrics.get(f"test.{f}", job.metrics.get(f)) for f in FIGURES]
        shown.add_row(
            str(job.number),
            escape(" ".join(job.overrides)) or "-",
            f"[{style}]{job.status}[/{style}]" if style else job.status,
            job.run_id or (f"task {job.sent['id']}" if job.sent else "-"),
            *(number(v) for v in values),
            f"{job.seconds:.1f}",
        )
    terminal().print(shown)


def terminal() -> Console:
    """The terminal; a pipe or a file is taken to be wide, for it is searched and not looked at."""
    return Console() if sys.stdout.isatty() else Console(width=160)


def number(value: Any, digits: int = 4) -> str:
    """A figure of fixed digits; a dash where there is none."""
    return "-" if value is None else f"{float(value):.{digits}f}"


def page_command() -> str:
    """The command that opens MLflow's page on the store in use, or the server's address."""
    uri = R.get_uri()
    if uri.startswith(("http://", "https://")):
        return uri
    return f"mlflow server --backend-store-uri {shlex.quote(uri)} --port 5000"
