"""Print the summary of a run, and the tables of a sweep's jobs."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from qtorch.cli.tables.console import (
    OverridesCell,
    format_number,
    format_status,
    new_table,
    print_table,
    terminal,
    with_label,
)
from qtorch.core.errors import ConfigError, QtorchError, format_count
from qtorch.core.secrets import redact_urls
from qtorch.study.sweep import (
    JobResult,
    SeedGroup,
    add_repeats,
    best_group,
    best_job,
    choose_metric,
    common_overrides,
    list_finished_runs,
    resolve_mode,
    seed_groups,
)
from qtorch.tracking.locations import run_page, server_command, sqlite_path
from qtorch.tracking.manager import R
from qtorch.tracking.recorder import Recorder, load_if_present

log = logging.getLogger(__name__)

FIGURES = ("IC", "ICIR", "Rank IC", "Rank ICIR")
# Widths of a terminal that has room for a job's figures, and for its run in a column of its own.
FIGURES_WIDTH, RUN_WIDTH = 110, 150
REPORT_FOLDER, PAGE = "report", "report.html"
MADE_MARKET = " (a made market)"
SEGMENTS = ("train", "valid", "test")


def print_summary(result: JobResult, recorder: Recorder, *, show_command: bool = True) -> None:
    """Print data, training, quality by segment, and how to view the run."""
    metrics = result.metrics
    console = terminal()
    facts_table = Table.grid(padding=(0, 2))
    for name, text in _facts(result, recorder).items():
        facts_table.add_row(Text(name, style="dim"), text)
    console.print()
    console.print(facts_table)
    quality_table = new_table("segment", *FIGURES, numbers=FIGURES)
    for segment in SEGMENTS:
        values = [metrics.get(f"{segment}.{f}") for f in FIGURES]
        if any(v is not None for v in values):
            quality_table.add_row(segment, *(format_number(v) for v in values))
    if quality_table.row_count:
        print_table(quality_table)
    if show_command:
        for label, text in _links(result, recorder).items():
            console.print(with_label(label, text), soft_wrap=True)


def _links(result: JobResult, recorder: Recorder) -> dict[str, str]:
    """Return where the results can be seen: files and addresses that a terminal can open."""
    links = {}
    if sqlite_path(R.get_uri()) is not None and REPORT_FOLDER in recorder.list_artifacts():
        page = Path(recorder.download_artifact(REPORT_FOLDER), PAGE)
        links["report:"] = page.resolve().as_uri()
    links["view the run:"] = mlflow_command()
    page_text = run_page(R.get_uri(), recorder.experiment_id, str(result.run_id))
    links["curves of the run:"] = page_text
    return links


def _facts(result: JobResult, recorder: Recorder) -> dict[str, str]:
    """Describe the data, the training and the run, by name."""
    metrics, fit = result.metrics, load_if_present(recorder, "fit_report")
    facts = _data_facts(recorder.load_object("task"))
    if fit:
        scores = load_if_present(recorder, "pred.pkl")
        test = "" if scores is None else f", {len(scores):,} test{_instruments_text(scores)}"
        facts["samples"] = f"{fit['samples']:,} train, {fit['valid_samples']:,} valid{test}"
        best = "" if fit.get("best_epoch") is None else f", best epoch: {fit['best_epoch']}"
        if fit["monitor"] is not None:
            counting = f"(counting from 0, monitor: {fit['monitor']})"
            facts["epochs"] = f"{fit['epochs']}{best} {counting}"
        facts["speed"] = _speed_text(fit, recorder)
        facts |= _memory_facts(fit)
    facts["time"] = f"{result.seconds:.1f} s"
    long_short = metrics.get("Long-Short Ann Return")
    market = MADE_MARKET if is_made_market(recorder.load_object("task")) else ""
    if long_short is not None:
        sharpe = format_number(metrics.get("Long-Short Ann Sharpe"), 2)
        text = f"{long_short:.1%} per year on the test segment before costs, Sharpe {sharpe}"
        facts["long-short"] = text + market
    portfolio = _portfolio_text(metrics, *_load_portfolio(metrics, recorder))
    if portfolio is not None:
        facts["portfolio"] = portfolio + market
    facts["run"] = f"{result.run_id} (experiment {result.experiment})"
    return facts


def _load_portfolio(metrics: Mapping[str, float], recorder: Recorder) -> tuple[Any, Any]:
    """Load the report of a run's backtest and its task; no report if there was no backtest."""
    from qtorch.record.portfolio import PERIODS
    from qtorch.record.report.results import load_portfolio_report

    if f"1day.{PERIODS}" not in metrics:
        return None, {}
    return load_portfolio_report(recorder, "1day"), recorder.load_object("task")


def _portfolio_text(metrics: Mapping[str, float], report: Any, task: Any) -> str | None:
    """Describe the returns of a daily backtest; None without one.

    The account's own return is said as well as that over the benchmark: a portfolio can lose money
    and still be far above a benchmark that loses more.
    """
    if report is None:
        return None
    from qtorch.metrics.risk import risk_analysis
    from qtorch.record.portfolio import PERIODS
    from qtorch.record.report.results import benchmark_name, has_benchmark, net_return

    own_risk = risk_analysis(net_return(report), metrics[f"1day.{PERIODS}"])["risk"]
    text = f"{own_risk['annualized_return']:.1%} per year after costs"
    if not has_benchmark(report):
        ratio = format_number(metrics.get("1day.return_with_cost.information_ratio"), 2)
        return f"{text} (no benchmark), information ratio {ratio}"
    excess = "1day.excess_return_with_cost"
    excess_return = metrics.get(f"{excess}.annualized_return", math.nan)
    ratio = format_number(metrics.get(f"{excess}.information_ratio"), 2)
    benchmark = f"the benchmark ({benchmark_name(task)})"
    return f"{text}; {excess_return:.1%} over {benchmark}, information ratio {ratio}"


def _speed_text(fit: Mapping[str, Any], recorder: Recorder) -> str:
    """Describe the speed of a training; that of another run is named if this run reused it."""
    from qtorch.study.sweep_job import FIT_FROM_TAG

    text = f"{fit['samples_per_second']:,.0f} samples/s during training on {fit['device']}"
    trained_run = recorder.list_tags().get(FIT_FROM_TAG)
    return (
        text if trained_run is None else f"{text}, in run {trained_run}: this one trained nothing"
    )


def _memory_facts(fit: Mapping[str, Any]) -> dict[str, str]:
    """Describe the memory of a training on a GPU, or of one whose features are rounded."""
    memory, dtype = fit.get("memory") or {}, fit.get("feature_dtype", "float32")
    if "peak" not in memory and dtype == "float32":
        return {}
    place = "in host memory" if fit.get("store") == "host" else "on the device"
    text = f"{_format_megabytes(memory['features'])} features ({dtype}, {place}), "
    text += f"{_format_megabytes(memory['weights'])} weights"
    if "peak" in memory:
        text += f", {_format_megabytes(memory['peak'])} of the device at most"
    return {"memory": text}


def _format_megabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"


def _data_facts(task: Any) -> dict[str, str]:
    """Describe the data source and the segments of a task."""
    dataset = task.get("dataset", {})
    handler = dataset.get("handler") or {}
    spans = [
        f"{name} {str(span[0])[:10]}..{str(span[1])[:10]}"
        for name, span in (dataset.get("segments") or {}).items()
    ]
    arguments = handler.get("kwargs") or handler
    name = _source_name(task) or handler.get("class") or handler.get("_target_") or "data"
    source = handler.get("source") or {}
    folder = source.get("path") or source.get("provider_uri")
    name = f"{name} {folder}" if isinstance(folder, str) else name
    data = ", ".join(str(part) for part in (name, arguments.get("instruments")) if part)
    if is_made_market(task):
        data += " (a made market with a signal in it: no real one has such figures)"
    return {"data": data, "segments": ", ".join(spans)}


def _instruments_text(scores: Any) -> str:
    number = scores.index.get_level_values("instrument").nunique()
    return f" (of {format_count(number, 'instrument')})"


def _source_name(task: Any) -> str:
    handler = (task.get("dataset") or {}).get("handler") or {}
    return str((handler.get("source") or {}).get("_target_", "")).rpartition(".")[2]


def is_made_market(task: Any) -> bool:
    """Whether the bars of a task are made by SyntheticSource, with a signal put into them."""
    return _source_name(task) == "SyntheticSource"


def mlflow_command() -> str:
    """Return the command that opens MLflow's UI on the current store, or the server's address."""
    return server_command(R.get_uri()) or redact_urls(R.get_uri())


# -- sweeps ----------------------------------------------------------------------------------------


def print_sweep(
    name: str, jobs: Sequence[JobResult], num_expected: int | None = None, command: str = ""
) -> None:
    """Print one row per job, then statistics over seeds if there are several, then the best job."""
    console = terminal()
    if not jobs:
        console.print(f"sweep {name}: no job has a run yet.")
        return
    rows = add_repeats(jobs)
    common = common_overrides(rows, command)
    title = f"sweep {name}: {job_counts_text(rows, num_expected)}"
    print_table(jobs_table(title, rows, common, _choice_metric(jobs)))
    if common:
        override_text = " ".join(o for o in rows[0].overrides if o in common)
        console.print(with_label("common overrides:", override_text), soft_wrap=True)
    groups = seed_groups(jobs, command)
    if any(len(g.jobs) > 1 for g in groups):
        print_table(_groups_table(groups))
    if groups:
        try:
            print_best(jobs, groups, None, None, common)
        except ConfigError as error:
            # The runs have no Rank IC; users can run qtorch sweep best NAME metric=...
            log.debug("%s", error)
        _print_selection(jobs)
    console.print(with_label("view the runs:", mlflow_command()), soft_wrap=True)


def job_counts_text(jobs: Sequence[JobResult], num_expected: int | None = None) -> str:
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
    jobs: Sequence[JobResult],
    groups: Sequence[SeedGroup],
    metric: str | None,
    mode: str | None,
    common: Collection[str],
) -> None:
    """Print the best job by a metric, and the best setting if there are several seeds.

    The overrides in `common` are not repeated.
    """
    console = terminal()
    metric = choose_metric(jobs, metric)
    mode = resolve_mode(metric, mode)
    job = best_job(jobs, metric, mode)
    if job is None:
        console.print(f"no finished job has {metric}.")
        return
    override_text = _override_text(job, common)
    text = f"{format_number(job.metrics[metric])}  "
    text += f"job {job.number} ({override_text}), run {job.run_id}"
    console.print(with_label(f"best by {metric}:", text), soft_wrap=True)
    group = best_group(groups, metric, mode)
    if group is not None and len(group.jobs) > 1:
        text = f"{_mean_text(group, metric)}  {group.name}"
        console.print(with_label("best over seeds:", text), soft_wrap=True)


def _print_selection(jobs: Sequence[JobResult]) -> None:
    """Print what the choice of the job with the best returns is worth, knowing all that were tried.

    Nothing is printed without two finished jobs with daily returns.
    """
    from qtorch.study.comparison import assess_runs

    try:
        selection = assess_runs(list_finished_runs(jobs))
    except QtorchError as error:
        log.warning("cannot assess the choice of the best job: %s", error)
        return
    if selection is None:
        return
    test, console = selection.test, terminal()
    for note in selection.notes:
        console.print(with_label("note:", note), soft_wrap=True)
    if test is None:
        return
    job = {j.run_id: j.number for j in jobs}[test.best]
    text = (
        f"{format_number(test.sharpe.sharpe)} per bar  job {job} (of {test.superiority.num_days} "
        f"bars; the return is {selection.returns_description})"
    )
    console.print(with_label("highest Sharpe ratio on the test segment:", text), soft_wrap=True)
    metric = _choice_metric(jobs)
    chosen = None if metric is None else best_job(jobs, metric, resolve_mode(metric))
    if chosen is not None and chosen.number != job:
        text = f"job {chosen.number} is the best by {metric}, another figure on other days"
        console.print(with_label("not the same job as above:", text), soft_wrap=True)
    figures = {
        "Hansen's p": test.superiority.p_value,
        "Reality Check p": test.superiority.reality_check,
        "probability of overfitting": test.overfitting.probability,
        "deflated Sharpe ratio": test.sharpe.probability,
    }
    text = ", ".join(f"{name} {format_number(value, 2)}" for name, value in figures.items())
    label = f"choice of job {job} among {format_count(selection.tries, 'try', 'tries')}:"
    console.print(with_label(label, f"{test.verdict} ({text})"), soft_wrap=True)


def _choice_metric(jobs: Sequence[JobResult]) -> str | None:
    """Return the metric by which the best job is chosen; None if the jobs have no such metric."""
    try:
        return choose_metric(jobs)
    except ConfigError:
        return None


def jobs_table(
    title: str,
    jobs: Sequence[JobResult],
    common: Collection[str] = (),
    choice_metric: str | None = None,
) -> Table:
    """Create a table of jobs with their overrides, without those in `common`, and metrics.

    Metrics are that by which the best job is chosen, and those of the test segment. On a narrow
    terminal the run and the note stand below the overrides, and there are fewer metrics.
    """
    is_narrow = terminal().width < RUN_WIDTH
    names = [f"test.{figure}" for figure in _table_figures()]
    if choice_metric is not None and choice_metric.removeprefix("test.") not in FIGURES:
        names = [choice_metric, *names]
    headings = [name.replace(".", "\n", 1) for name in names]
    columns = ("overrides, run", "status") if is_narrow else ("overrides", "status", "run")
    numbers = (*headings, "seconds")
    table = new_table(
        *("job", *columns, *numbers),
        title=title,
        numbers=("job", *numbers),
        no_wrap=("status", "run"),
    )
    for job in jobs:
        note = job.note if job.same_as is None else f"same as job {job.same_as}"
        run = job.run_id or (f"task {job.pool_task['id']}" if job.pool_task else "-")
        overrides = OverridesCell(_override_text(job, common))
        values = [job.metrics.get(n, job.metrics.get(n.removeprefix("test."))) for n in names]
        cells: tuple[Any, ...] = (overrides, format_status(job.status, note), run)
        if is_narrow:
            cells = (Group(overrides, *filter(None, (run, note))), format_status(job.status))
        table.add_row(
            str(job.number),
            *cells,
            *(format_number(v) for v in values),
            "-" if math.isnan(job.seconds) else f"{job.seconds:.1f}",
        )
    return table


def _groups_table(groups: Sequence[SeedGroup]) -> Table:
    figures = _table_figures()
    numbers = ("seeds", *figures)
    title = "over seeds: mean ± standard deviation on the test segment"
    table = new_table("setting", *numbers, title=title, numbers=numbers)
    for group in groups:
        has_test_metrics = any(f"test.{f}" in j.metrics for j in group.jobs for f in FIGURES)
        cells = [_mean_text(group, f"test.{f}" if has_test_metrics else f) for f in figures]
        table.add_row(OverridesCell(group.name), str(len(group.jobs)), *cells)
    return table


def _table_figures() -> tuple[str, ...]:
    return FIGURES if terminal().width >= FIGURES_WIDTH else ("IC", "Rank IC")


def _mean_text(group: SeedGroup, metric: str) -> str:
    mean, deviation, count = group.metric_statistics(metric)
    if not count:
        return "-"
    spread_text = "" if math.isnan(deviation) else f" ± {deviation:.4f}"
    return f"{mean:.4f}{spread_text}"


def _override_text(job: JobResult, common: Collection[str]) -> str:
    return " ".join(o for o in job.overrides if o not in common) or "-"
