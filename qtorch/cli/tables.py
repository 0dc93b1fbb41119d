"""Print the summary of a run and the table of jobs in a pool."""

from __future__ import annotations

import json
import logging
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qtorch.cli.jobs.results import JobResult
from qtorch.core.errors import ConfigError, LoadObjectError, QtorchError, format_count
from qtorch.study.sweep import (
    SeedGroup,
    SweepJob,
    best_group,
    best_job,
    choose_metric,
    common_overrides,
    resolve_mode,
    seed_groups,
)
from qtorch.tracking.locations import redact_password
from qtorch.tracking.manager import R
from qtorch.tracking.recorder import Recorder
from qtorch.tracking.trials.trial import TrialRow

if TYPE_CHECKING:
    from qtorch.tracking.trials.study import Trials


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
            job.run_id or (f"task {job.pool_task['id']}" if job.pool_task else "-"),
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


log = logging.getLogger(__name__)


def print_sweep(
    name: str, jobs: Sequence[SweepJob], num_expected: int | None = None, command: str = ""
) -> None:
    """Print one row per job, then statistics over seeds if there are several, then the best job."""
    console = terminal()
    if not jobs:
        console.print(f"sweep {name}: no job has a run yet.")
        return
    common = common_overrides(jobs, command)
    console.print(_jobs_table(f"sweep {name}: {counts_text(jobs, num_expected)}", jobs, common))
    if common:
        override_text = " ".join(o for o in jobs[0].overrides if o in common)
        console.print(f"[dim]common overrides:[/dim] {escape(override_text)}", soft_wrap=True)
    groups = seed_groups(jobs)
    if any(len(g.jobs) > 1 for g in groups):
        console.print(_groups_table(groups))
    if groups:
        try:
            print_best(jobs, groups, None, None)
        except ConfigError as error:
            # The runs have no Rank IC; users can run qtorch sweep best NAME metric=...
            log.debug("%s", error)
    console.print(f"[dim]view the runs:[/dim] {mlflow_command()}", soft_wrap=True)


def counts_text(jobs: Sequence[SweepJob], num_expected: int | None = None) -> str:
    """Format the number of jobs by status."""
    statuses = dict.fromkeys(j.status for j in jobs)
    if list(statuses) == ["FINISHED"] and len(jobs) >= (num_expected or 0):
        return f"{format_count(len(jobs), 'job')}, all finished"
    parts = [f"{sum(j.status == s for j in jobs)} {s.lower()}" for s in statuses]
    num_missing = (num_expected or 0) - len(jobs)
    if num_missing > 0:
        parts.append(f"{num_missing} not started")
    return f"{format_count(max(len(jobs), num_expected or 0), 'job')}, {', '.join(parts)}"


def print_best(
    jobs: Sequence[SweepJob], groups: Sequence[SeedGroup], metric: str | None, mode: str | None
) -> None:
    """Print the best job by a metric, and the best setting if there are several seeds."""
    console = terminal()
    metric = choose_metric(jobs, metric)
    mode = resolve_mode(metric, mode)
    job = best_job(jobs, metric, mode)
    if job is None:
        console.print(f"no finished job has {metric}.")
        return
    override_text = _override_text(job, common_overrides(jobs))
    text = f"[dim]best by {metric}:[/dim] {format_number(job.metrics[metric])}  "
    text += f"job {job.number} ({escape(override_text)}), run {job.run_id}"
    console.print(text, soft_wrap=True)
    group = best_group(groups, metric, mode)
    if group is not None and len(group.jobs) > 1:
        text = f"[dim]best over seeds:[/dim] {_mean_text(group, metric)}  {escape(group.name)}"
        console.print(text, soft_wrap=True)


def _jobs_table(title: str, jobs: Sequence[SweepJob], common: set[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    table.add_column("job", justify="right")
    for name in ("overrides", "status", "run"):
        table.add_column(name, overflow="fold")
    for name in (*FIGURES, "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    for job in jobs:
        style = STATUS_STYLE.get(job.status, "")
        status = f"[{style}]{job.status}[/{style}]" if style else job.status
        values = [job.metrics.get(f"test.{f}", job.metrics.get(f)) for f in FIGURES]
        table.add_row(
            str(job.number),
            escape(_override_text(job, common)),
            f"{status} ({job.note})" if job.note else status,
            job.run_id or "-",
            *(format_number(v) for v in values),
            "-" if math.isnan(job.seconds) else f"{job.seconds:.1f}",
        )
    return table


def _groups_table(groups: Sequence[SeedGroup]) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title="over seeds: mean ± standard deviation on the test segment",
        title_justify="left",
    )
    table.add_column("setting", overflow="fold")
    table.add_column("seeds", justify="right")
    for name in FIGURES:
        table.add_column(name, justify="right", no_wrap=True)
    for group in groups:
        has_test_metrics = any(f"test.{f}" in j.metrics for j in group.jobs for f in FIGURES)
        cells = [_mean_text(group, f"test.{f}" if has_test_metrics else f) for f in FIGURES]
        table.add_row(escape(group.name), str(len(group.jobs)), *cells)
    return table


def _mean_text(group: SeedGroup, metric: str) -> str:
    mean, deviation, count = group.metric_statistics(metric)
    if not count:
        return "-"
    spread_text = "" if math.isnan(deviation) else f" ± {deviation:.4f}"
    return f"{mean:.4f}{spread_text}"


def _override_text(job: SweepJob, common: set[str]) -> str:
    return " ".join(o for o in job.overrides if o not in common) or "-"


STYLE = {"COMPLETE": "green", "PRUNED": "yellow", "FAIL": "red", "RUNNING": "cyan"}
CHART_FILE, TRIALS_FILE = "search.png", "search.json"
FORMAT_VERSION = 1


def report_study(study: Trials, metric: str, folder: Path, sweep_run_id: str | None) -> None:
    """Print the trials, and write a chart and a JSON file.

    Both files go into the sweep's folder, and into the sweep's run if there is one.
    """
    rows, maximize = study.rows(), study.direction == "maximize"
    importances = study.importances()
    _print_trials(study, rows, metric, importances, maximize)
    paths = [folder / TRIALS_FILE]
    record = {
        "format": FORMAT_VERSION,
        "study": study.name,
        "metric": metric,
        "direction": study.direction,
    }
    record |= {"storage": redact_password(study.url), "importances": importances}
    paths[0].write_text(json.dumps({**record, "trials": [asdict(r) for r in rows]}, indent=1))
    if any(r.value is not None for r in rows):
        from qtorch.study.search_chart import search_chart

        figure = search_chart(rows, metric, maximize=maximize, importances=importances)
        figure.savefig(folder / CHART_FILE, dpi=120)
        paths.append(folder / CHART_FILE)
    if sweep_run_id is not None:
        _log_artifacts(sweep_run_id, paths)
    _console().print(f"[dim]saved to:[/dim] {paths[-1]}", soft_wrap=True)


def _print_trials(
    study: Trials,
    rows: Sequence[TrialRow],
    metric: str,
    importances: dict[str, float],
    maximize: bool,
) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    num_ended = sum(r.state in ("COMPLETE", "PRUNED") for r in rows)
    table.title = f"study {study.name}: {format_count(num_ended, 'trial')} by {metric}"
    names = list(dict.fromkeys(n for r in rows for n in r.params))
    table.add_column("trial", justify="right")
    table.add_column("status")
    table.add_column(metric, justify="right")
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    for name in ("epochs", "run"):
        table.add_column(name, overflow="fold", justify="right" if name == "epochs" else "left")
    for row in sorted(rows, key=lambda r: _sort_key(r, maximize)):
        style = STYLE.get(row.state, "dim") if not row.replaced else "dim"
        table.add_row(
            str(row.number),
            f"[{style}]{row.state}[/{style}]",
            format_number(row.value),
            *(_format_value(row.params.get(n)) for n in names),
            str(row.steps or "-"),
            _outcome(row),
        )
    _console().print(table)
    complete_trials = [r for r in rows if r.state == "COMPLETE" and r.value is not None]
    if complete_trials:
        best = min(complete_trials, key=lambda r: _sort_key(r, maximize))
        best_params = " ".join(f"{n}={_format_value(v)}" for n, v in best.params.items())
        _console().print(
            f"best: trial {best.number}, {metric} {format_number(best.value)}, run {best.run_id}"
        )
        _console().print(f"      {best_params}", soft_wrap=True)
    if importances:
        importance_text = ", ".join(f"{name} {share:.0%}" for name, share in importances.items())
        _console().print(f"importance: {importance_text}", soft_wrap=True)


def _sort_key(row: TrialRow, maximize: bool) -> tuple[int, float, int]:
    """Sort complete trials by value, then pruned ones by value, then the others by number."""
    rank = {"COMPLETE": 0, "PRUNED": 1}.get(row.state, 2)
    value = row.value if row.value is not None and rank < 2 else 0.0
    return rank, -value if maximize else value, row.number


def _outcome(row: TrialRow) -> str:
    """Return the run ID; or why there is none, or that the trial was retried."""
    if row.replaced and row.run_id:
        return "failed, retried"
    return row.run_id or (row.error or "-")[:60]


def _format_value(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _log_artifacts(sweep_run_id: str, files: Sequence[Path]) -> None:
    """Log the files as artifacts of the sweep's run."""
    from qtorch.tracking.manager import R

    try:
        run = R.get_recorder(recorder_id=sweep_run_id)
        for path in files:
            run.log_artifact(path)
    except QtorchError as error:
        log.warning("cannot log the search's files in run %s: %s", sweep_run_id, error)


def _console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=160)
