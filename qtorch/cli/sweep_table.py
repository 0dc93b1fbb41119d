"""Print a sweep: its jobs, statistics over seeds, and the best job."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from rich import box
from rich.markup import escape
from rich.table import Table

from qtorch.cli.table import FIGURES, STATUS_STYLE, format_number, mlflow_command, terminal
from qtorch.core.errors import ConfigError
from qtorch.core.wording import format_count
from qtorch.study.sweep import SweepJob
from qtorch.study.sweep_groups import (
    SeedGroup,
    best_group,
    best_job,
    choose_metric,
    common_overrides,
    resolve_mode,
    seed_groups,
)

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
