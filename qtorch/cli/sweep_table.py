"""A sweep on the terminal: its jobs, the spread over seeds, the best."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from rich import box
from rich.markup import escape
from rich.table import Table

from qtorch.cli.table import FIGURES, STATUS_STYLE, number, page_command, terminal
from qtorch.core.errors import ConfigError
from qtorch.core.wording import counted
from qtorch.study.sweep import SweepJob
from qtorch.study.sweep_groups import (
    SeedGroup,
    best_group,
    best_job,
    best_metric,
    common_overrides,
    mode_of,
    seed_groups,
)

log = logging.getLogger(__name__)


def print_sweep(
    name: str, jobs: Sequence[SweepJob], expected: int | None = None, command: str = ""
) -> None:
    """One row a job; then mean and deviation where there are several seeds; then the best."""
    console = terminal()
    if not jobs:
        console.print(f"sweep {name}: no job has a run yet.")
        return
    common = common_overrides(jobs, command)
    console.print(_jobs(f"sweep {name}: {counts_text(jobs, expected)}", jobs, common))
    if common:
        told = " ".join(o for o in jobs[0].overrides if o in common)
        console.print(f"[dim]all with:[/dim] {escape(told)}", soft_wrap=True)
    groups = seed_groups(jobs)
    if any(len(g.jobs) > 1 for g in groups):
        console.print(_groups(groups))
    if groups:
        try:
            print_best(jobs, groups, None, None)
        except ConfigError as error:  # no Rank IC: qtorch sweep best NAME metric=...
            log.debug("%s", error)
    console.print(f"[dim]look at it:[/dim] {page_command()}", soft_wrap=True)


def counts_text(jobs: Sequence[SweepJob], expected: int | None = None) -> str:
    """How many jobs there are, by status."""
    statuses = dict.fromkeys(j.status for j in jobs)
    if list(statuses) == ["FINISHED"] and len(jobs) >= (expected or 0):
        return f"{counted(len(jobs), 'job')}, all finished"
    parts = [f"{sum(j.status == s for j in jobs)} {s.lower()}" for s in statuses]
    missing = (expected or 0) - len(jobs)
    if missing > 0:
        parts.append(f"{missing} not begun")
    return f"{counted(max(len(jobs), expected or 0), 'job')}, {', '.join(parts)}"


def print_best(
    jobs: Sequence[SweepJob], groups: Sequence[SeedGroup], metric: str | None, mode: str | None
) -> None:
    """The best job, and the best setting where there are several seeds, by a metric."""
    console = terminal()
    metric = best_metric(jobs, metric)
    mode = mode_of(metric, mode)
    job = best_job(jobs, metric, mode)
    if job is None:
        console.print(f"no finished job has {metric}.")
        return
    varied = _varied(job, common_overrides(jobs))
    told = f"[dim]best by {metric}:[/dim] {number(job.metrics[metric])}  "
    told += f"job {job.number} ({escape(varied)}), run {job.run_id}"
    console.print(told, soft_wrap=True)
    group = best_group(groups, metric, mode)
    if group is not None and len(group.jobs) > 1:
        told = f"[dim]best over seeds:[/dim] {_spread(group, metric)}  {escape(group.name)}"
        console.print(told, soft_wrap=True)


def _jobs(title: str, jobs: Sequence[SweepJob], common: set[str]) -> Table:
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    shown.add_column("job", justify="right")
    for name in ("varied", "status", "run"):
        shown.add_column(name, overflow="fold")
    for name in (*FIGURES, "seconds"):
        shown.add_column(name, justify="right", no_wrap=True)
    for job in jobs:
        style = STATUS_STYLE.get(job.status, "")
        status = f"[{style}]{job.status}[/{style}]" if style else job.status
        values = [job.metrics.get(f"test.{f}", job.metrics.get(f)) for f in FIGURES]
        shown.add_row(
            str(job.number),
            escape(_varied(job, common)),
            f"{status} ({job.note})" if job.note else status,
            job.run_id or "-",
            *(number(v) for v in values),
            "-" if math.isnan(job.seconds) else f"{job.seconds:.1f}",
        )
    return shown


def _groups(groups: Sequence[SeedGroup]) -> Table:
    shown = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title="over seeds: mean ± deviation of the test segment",
        title_justify="left",
    )
    shown.add_column("setting", overflow="fold")
    shown.add_column("seeds", justify="right")
    for name in FIGURES:
        shown.add_column(name, justify="right", no_wrap=True)
    for group in groups:
        tested = any(f"test.{f}" in j.metrics for j in group.jobs for f in FIGURES)
        cells = [_spread(group, f"test.{f}" if tested else f) for f in FIGURES]
        shown.add_row(escape(group.name), str(len(group.jobs)), *cells)
    return shown


def _spread(group: SeedGroup, metric: str) -> str:
    mean, deviation, count = group.spread(metric)
    if not count:
        return "-"
    spread = "" if math.isnan(deviation) else f" ± {deviation:.4f}"
    return f"{mean:.4f}{spread}"


def _varied(job: SweepJob, common: set[str]) -> str:
    return " ".join(o for o in job.overrides if o not in common) or "-"
