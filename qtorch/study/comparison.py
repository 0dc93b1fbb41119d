"""Compare runs: group them by setting, test differences, and deflate the Sharpe ratios."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import pandas as pd

from qtorch.core.errors import ConfigError
from qtorch.metrics.selection import SelectionTest, assess_selection
from qtorch.metrics.signal import mean_over_std
from qtorch.metrics.significance import (
    DeflatedSharpe,
    PairedTest,
    deflated_sharpe,
    holm,
    paired_test,
)
from qtorch.record.report.results import (
    has_benchmark,
    load_portfolio_report,
    model_name,
    net_excess_return,
    net_return,
    run_results,
)
from qtorch.study.sweep import count_tried_jobs
from qtorch.tracking.recorder import COMMAND_PARAM, Recorder, load_if_present

SEED_PARAMS = ("seed", "model.seed", "model.kwargs.seed")
LONG_SHORT = "half of (top quintile − bottom quintile by score), before costs"
MAX_NAME_PARAMS, MAX_VALUE_LENGTH = 3, 24  # shown in a group's name
SERIES_TITLES = {"ic": "Daily IC", "rank_ic": "Daily Rank IC", "returns": "Daily return"}


@dataclass(frozen=True)
class ComparedRun:
    """One run: its metrics and params, and its daily IC, Rank IC and return (None if missing)."""

    id: str
    name: str
    metrics: Mapping[str, float]
    params: Mapping[str, str]
    freq: str
    ic: pd.Series | None
    rank_ic: pd.Series | None
    returns: pd.Series | None

    @property
    def seed(self) -> str:
        """The task's seed, as text."""
        return next((self.params[k] for k in SEED_PARAMS if k in self.params), "")


@dataclass(frozen=True)
class RunGroup:
    """Runs whose params are equal except for the seed, named after what differs between groups."""

    name: str
    runs: tuple[ComparedRun, ...]

    def mean_and_std(self, metric: str) -> tuple[float, float]:
        """Mean and standard deviation of a metric over the runs (ddof 1; NaN for one run).

        Both are NaN if a run lacks the metric.
        """
        values = pd.Series([r.metrics.get(metric, math.nan) for r in self.runs])
        if values.isna().any():
            return math.nan, math.nan
        return float(values.mean()), float(values.std(ddof=1))

    def by_run(self, series: str) -> pd.DataFrame:
        """A daily series ("ic", "rank_ic", "returns") of each run: a frame of days by run IDs."""
        series_by_run = {r.id: getattr(r, series) for r in self.runs}
        return pd.DataFrame({k: v for k, v in series_by_run.items() if v is not None}).sort_index()

    def daily(self, series: str) -> pd.Series:
        """The mean of a daily series over the runs, on the days that all of them have."""
        table = self.by_run(series).dropna()
        return table.mean(axis=1)


@dataclass(frozen=True)
class GroupTest:
    """A paired test of a daily series of two groups.

    `adjusted_p_value` is the p-value corrected for the number of tested pairs.
    """

    series: str
    first: str
    second: str
    test: PairedTest
    adjusted_p_value: float


@dataclass(frozen=True)
class RunSelection:
    """The result of `assess_runs`: `test` assesses the choice of the best of the runs.

    `returns_description` describes the daily returns that were used, `tries_description` where the
    number of tries comes from.
    """

    test: SelectionTest
    tries: int
    tries_description: str
    returns_description: str


@dataclass(frozen=True)
class Comparison:
    """The result of `compare_runs`.

    `sharpe` holds the deflated Sharpe ratio by run ID, as if the run were the best of `tries`;
    `selection` assesses the choice of the best run (None without two runs with daily returns).
    The descriptions are those of `RunSelection`.
    """

    groups: tuple[RunGroup, ...]
    tests: tuple[GroupTest, ...]
    sharpe: Mapping[str, DeflatedSharpe]
    selection: SelectionTest | None
    tries: int
    tries_description: str
    returns_description: str

    @property
    def runs(self) -> list[ComparedRun]:
        """All runs, group by group."""
        return [run for group in self.groups for run in group.runs]


def compare_runs(recorders: Sequence[Recorder], *, tries: int | None = None) -> Comparison:
    """Compare runs by their artifacts and metrics.

    A run's daily return is that of its portfolio after costs, in excess of the benchmark if there
    is one. If a run has no portfolio, the returns of all runs are those of their long-short
    quantiles (before costs). Groups are compared by the daily mean of their runs (`paired_test`);
    the p-values of a series are adjusted by Holm's method for the number of pairs. `tries` is the
    total number of strategies that were tried, including those not compared here (default: all
    jobs of the sweeps and searches of the runs, or else the runs). The deflated Sharpe ratio is
    only as honest as this number. The best run by Sharpe ratio is also assessed by the probability
    of backtest overfitting and by Hansen's test, on the days that all runs have.
    """
    recorders = list({r.id: r for r in recorders}.values())
    if len(recorders) < 2:
        raise ConfigError(f"a comparison needs two different runs; got {len(recorders)}.")
    results_list = [run_results(r) for r in recorders]
    daily, description = _daily_returns(recorders, [r.report for r in results_list])
    runs = [
        ComparedRun(
            id=str(recorder.id),
            name=str(recorder.name),
            metrics=recorder.list_metrics(),
            params=recorder.list_params(),
            freq=results.freq,
            ic=results.ic,
            rank_ic=results.rank_ic,
            returns=returns,
        )
        for recorder, results, returns in zip(recorders, results_list, daily, strict=True)
    ]
    num_tries, source = _count_tries(recorders, tries)
    groups = group_runs(runs)
    return Comparison(
        groups=groups,
        tests=tuple(t for series in SERIES_TITLES for t in _test_pairs(groups, series)),
        sharpe=_sharpe_by_run(runs, num_tries),
        selection=_assess_returns({r.id: r.returns for r in runs}, num_tries),
        tries=num_tries,
        tries_description=source,
        returns_description=description,
    )


def assess_runs(recorders: Sequence[Recorder], *, tries: int | None = None) -> RunSelection | None:
    """Assess the choice of the best of the runs by Sharpe ratio; None without two daily returns.

    The daily returns, the tests and `tries` are those of `compare_runs`.
    """
    recorders = list({r.id: r for r in recorders}.values())
    daily, description = _daily_returns(recorders, [load_portfolio_report(r) for r in recorders])
    num_tries, source = _count_tries(recorders, tries)
    returns = {str(r.id): values for r, values in zip(recorders, daily, strict=True)}
    test = _assess_returns(returns, num_tries)
    return None if test is None else RunSelection(test, num_tries, source, description)


def _count_tries(recorders: Sequence[Recorder], tries: int | None) -> tuple[int, str]:
    """The number of strategies that were tried, and where it comes from."""
    num_tries, source = len(recorders), "the compared runs"
    if tries is not None:
        num_tries, source = tries, "as given"
    elif (num_jobs := count_tried_jobs(recorders)) > num_tries:
        num_tries, source = num_jobs, "all jobs of the runs' sweeps"
    if num_tries < len(recorders):
        raise ConfigError(
            f"tries={tries}, but {len(recorders)} runs are compared and each of them counts as a "
            "try."
        )
    return num_tries, source


def group_runs(runs: Sequence[ComparedRun]) -> tuple[RunGroup, ...]:
    """Group runs whose params are equal except for the seed, in the order of their first runs."""
    by_params: dict[frozenset[tuple[str, str]], list[ComparedRun]] = {}
    for run in runs:
        by_params.setdefault(frozenset(_setting_params(run.params).items()), []).append(run)
    settings = [dict(key) for key in by_params]
    names = _group_names(settings)
    return tuple(
        RunGroup(name, tuple(members))
        for name, members in zip(names, by_params.values(), strict=True)
    )


def differing_params(groups: Sequence[RunGroup]) -> dict[str, list[str]]:
    """The params that are not equal in all groups: `{param: [value of each group]}`."""
    settings = [_setting_params(g.runs[0].params) for g in groups]
    keys = sorted({k for s in settings for k in s})
    table = {k: [s.get(k, "") for s in settings] for k in keys}
    return {k: values for k, values in table.items() if len(set(values)) > 1}


def _setting_params(params: Mapping[str, str]) -> dict[str, str]:
    """The params that define a run's setting: no seed, command line or environment variables."""
    return {
        k: v
        for k, v in params.items()
        if k not in (*SEED_PARAMS, COMMAND_PARAM) and not k.startswith("QTORCH_")
    }


def _group_names(settings: Sequence[Mapping[str, str]]) -> list[str]:
    models = [model_name(s) for s in settings]
    shared_params = sorted(set.intersection(*(set(s) for s in settings)))
    varying_params = [
        k for k in shared_params if len({s[k] for s in settings}) > 1 and not _is_class_param(k)
    ]
    names = []
    for model, setting in zip(models, settings, strict=True):
        parts = [model] if len(set(models)) > 1 or not varying_params else []
        parts += [
            f"{k.rpartition('.')[2]}={shorten(setting[k], MAX_VALUE_LENGTH)}"
            for k in varying_params[:MAX_NAME_PARAMS]
        ]
        names.append(", ".join(parts))
    count, occurrences = Counter(names), Counter[str]()
    for k, name in enumerate(names):
        if count[name] > 1:  # they differ only in params that not all groups have
            occurrences[name] += 1
            names[k] = f"{name} ({occurrences[name]})"
    return names


def _is_class_param(key: str) -> bool:
    return key.endswith(("._target_", ".class", ".module_path"))


def shorten(text: str, length: int) -> str:
    """Return a text with at most that many characters, the last of them "…" if it was longer."""
    return text if len(text) <= length else text[: length - 1] + "…"


def _daily_returns(
    recorders: Sequence[Recorder], portfolio_reports: Sequence[pd.DataFrame | None]
) -> tuple[list[pd.Series | None], str]:
    """The same kind of daily return of every run, and its name."""
    reports = [r for r in portfolio_reports if r is not None]
    if len(reports) < len(recorders):
        long_short = "sig_analysis/long_short_r.pkl"
        return [load_if_present(r, long_short) for r in recorders], LONG_SHORT
    if all(has_benchmark(r) for r in reports):
        return [net_excess_return(r) for r in reports], "portfolio after costs less benchmark"
    return [net_return(r) for r in reports], "portfolio after costs"


def _test_pairs(groups: Sequence[RunGroup], series: str) -> list[GroupTest]:
    daily = {g.name: g.daily(series) for g in groups}
    pairs = [(a, b) for a, b in combinations(daily, 2) if len(daily[a]) and len(daily[b])]
    tests = [paired_test(daily[a], daily[b]) for a, b in pairs]
    adjusted_p_values = holm([t.p_value for t in tests])
    return [
        GroupTest(series, a, b, test, p)
        for (a, b), test, p in zip(pairs, tests, adjusted_p_values, strict=True)
    ]


def _sharpe_by_run(runs: Sequence[ComparedRun], tries: int) -> dict[str, DeflatedSharpe]:
    returns_by_run = {r.id: r.returns for r in runs if r.returns is not None}
    sharpes = [s for s in map(mean_over_std, returns_by_run.values()) if math.isfinite(s)]
    return {
        run: deflated_sharpe(returns, tries, sharpes) for run, returns in returns_by_run.items()
    }


def _assess_returns(returns: Mapping[str, pd.Series | None], tries: int) -> SelectionTest | None:
    table = pd.DataFrame({run: r for run, r in returns.items() if r is not None})
    return assess_selection(table, tries=tries) if table.shape[1] > 1 else None
