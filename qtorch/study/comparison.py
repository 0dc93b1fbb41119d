"""Compare runs: group them by setting, test differences, and deflate the Sharpe ratios."""

from __future__ import annotations

import ast
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

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
from qtorch.study.sweep import common_words, count_tried_jobs, overrides_in_sweep, setting_text
from qtorch.tracking.recorder import COMMAND_PARAM, Recorder, load_if_present

SEED_PARAMS = ("seed", "model.seed", "model.kwargs.seed")
LONG_SHORT = "half of (top quintile − bottom quintile by score), before costs"
MAX_NAME_PARAMS, MAX_VALUE_LENGTH = 3, 24  # shown in a group's name
SERIES_TITLES = {"ic": "Daily IC", "rank_ic": "Daily Rank IC", "returns": "Daily return"}


@dataclass(frozen=True)
class ComparedRun:
    """One run: its metrics and params, and its daily IC, Rank IC and return (None if missing).

    `overrides` are those of the job of a sweep that all compared runs belong to.
    """

    id: str
    name: str
    metrics: Mapping[str, float]
    params: Mapping[str, str]
    freq: str
    ic: pd.Series | None
    rank_ic: pd.Series | None
    returns: pd.Series | None
    overrides: tuple[str, ...] = ()

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

    `test` is None if there is nothing to choose among; then `notes` say why. `returns_description`
    describes the daily returns that were used, `tries_description` where the number of tries comes
    from.
    """

    test: SelectionTest | None
    tries: int
    tries_description: str
    returns_description: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class DailyReturns:
    """The same kind of daily return of every run, by run ID (None if missing).

    `notes` say what a reader must know before comparing them.
    """

    by_run: Mapping[str, pd.Series | None]
    description: str
    notes: tuple[str, ...] = ()

    def distinct(self) -> dict[str, pd.Series]:
        """Return the different series, each under the first of the runs that have it."""
        by_run = {run: series for run, series in self.by_run.items() if series is not None}
        values = {
            run: (series.index.to_numpy().tobytes(), series.to_numpy().tobytes())
            for run, series in by_run.items()
        }
        first_runs: dict[Any, str] = {}
        for run, key in values.items():
            first_runs.setdefault(key, run)
        return {run: by_run[run] for run in first_runs.values()}


@dataclass(frozen=True)
class Comparison:
    """The result of `compare_runs`.

    `sharpe` holds the deflated Sharpe ratio by run ID, as if the run were the best of `tries`;
    `selection` assesses the choice of the best run (None without two runs with different daily
    returns). The descriptions and notes are those of `RunSelection`.
    """

    groups: tuple[RunGroup, ...]
    tests: tuple[GroupTest, ...]
    sharpe: Mapping[str, DeflatedSharpe]
    selection: SelectionTest | None
    tries: int
    tries_description: str
    returns_description: str
    notes: tuple[str, ...] = ()

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
    returns = _daily_returns(recorders, [r.report for r in results_list])
    overrides = overrides_in_sweep(recorders)
    runs = [
        ComparedRun(
            id=str(recorder.id),
            name=str(recorder.name),
            metrics=recorder.list_metrics(),
            params=recorder.list_params(),
            freq=results.freq,
            ic=results.ic,
            rank_ic=results.rank_ic,
            returns=returns.by_run[str(recorder.id)],
            overrides=tuple(overrides.get(str(recorder.id), ())),
        )
        for recorder, results in zip(recorders, results_list, strict=True)
    ]
    num_tries, source = _count_tries(recorders, tries)
    selection, notes = _assess_returns(returns, num_tries)
    groups = group_runs(runs)
    return Comparison(
        groups=groups,
        tests=tuple(t for series in SERIES_TITLES for t in _test_pairs(groups, series)),
        sharpe=_sharpe_by_run(returns, num_tries),
        selection=selection,
        tries=num_tries,
        tries_description=source,
        returns_description=returns.description,
        notes=(*returns.notes, *notes),
    )


def assess_runs(recorders: Sequence[Recorder], *, tries: int | None = None) -> RunSelection | None:
    """Assess the choice of the best of the runs by Sharpe ratio; None without two daily returns.

    The daily returns, the tests and `tries` are those of `compare_runs`.
    """
    recorders = list({r.id: r for r in recorders}.values())
    returns = _daily_returns(recorders, [load_portfolio_report(r) for r in recorders])
    num_tries, source = _count_tries(recorders, tries)
    test, notes = _assess_returns(returns, num_tries)
    if test is None and not notes:
        return None
    return RunSelection(test, num_tries, source, returns.description, (*returns.notes, *notes))


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
    names = _sweep_group_names(list(by_params.values()))
    if names is None:
        names = _group_names([dict(key) for key in by_params])
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
    """The params that define a run's setting: no seed, command line or environment variables.

    A param that is a list of configurations, such as the records, becomes one param per setting.
    """
    return {
        name: text
        for key, value in params.items()
        if key not in (*SEED_PARAMS, COMMAND_PARAM) and not key.startswith("QTORCH_")
        for name, text in _flatten_param(key, _parse_configurations(value))
    }


def _parse_configurations(text: str) -> Any:
    """Return the list that a param shows as text if it has configurations; else the text."""
    if not (text.startswith("[") and "{" in text):
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):  # the text was cut, or shows an object
        return text


def _flatten_param(key: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yield the settings in a param by name; configurations in a list are named by their class."""
    if isinstance(value, Mapping) and value:
        parts = {str(name): part for name, part in value.items()}
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        parts = {str(number): item for number, item in enumerate(value)}
        classes = [_class_name(item) for item in value]
        if len(set(classes)) == len(classes) and all(classes):
            parts = dict(zip(classes, value, strict=True))
    else:
        yield key, str(value)
        return
    for name, part in parts.items():
        yield from _flatten_param(f"{key}.{name}", part)


def _class_name(configuration: Any) -> str:
    if not isinstance(configuration, Mapping):
        return str(configuration)
    name = configuration.get("_target_", configuration.get("class", ""))
    return str(name).rpartition(".")[2]


def _sweep_group_names(groups: Sequence[Sequence[ComparedRun]]) -> list[str] | None:
    """Name groups as the table of their sweep does; None without a sweep or different names."""
    common = common_words([run.overrides for runs in groups for run in runs])
    names = [setting_text(runs[0].overrides, common) for runs in groups]
    has_overrides = all(run.overrides for runs in groups for run in runs)
    return names if has_overrides and len(set(names)) == len(names) > 1 else None


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
) -> DailyReturns:
    """The same kind of daily return of every run."""
    reports = [r for r in portfolio_reports if r is not None]
    if len(reports) < len(recorders):
        long_short = "sig_analysis/long_short_r.pkl"
        notes: tuple[str, ...] = ()
        if reports:
            num_missing = len(recorders) - len(reports)
            text = (
                f"{num_missing} of the {len(recorders)} runs have no portfolio, so this comparison "
                "does not use the portfolios of the others. "
                f"The return of every run is {LONG_SHORT}."
            )
            notes = (text,)
        by_run = {str(r.id): load_if_present(r, long_short) for r in recorders}
        return DailyReturns(by_run, LONG_SHORT, notes)
    has_benchmarks = all(has_benchmark(r) for r in reports)
    select = net_excess_return if has_benchmarks else net_return
    description = "portfolio after costs" + (" less benchmark" if has_benchmarks else "")
    by_run = {str(r.id): select(report) for r, report in zip(recorders, reports, strict=True)}
    return DailyReturns(by_run, description)


def _test_pairs(groups: Sequence[RunGroup], series: str) -> list[GroupTest]:
    daily = {g.name: g.daily(series) for g in groups}
    pairs = [(a, b) for a, b in combinations(daily, 2) if len(daily[a]) and len(daily[b])]
    tests = [paired_test(daily[a], daily[b]) for a, b in pairs]
    adjusted_p_values = holm([t.p_value for t in tests])
    return [
        GroupTest(series, a, b, test, p)
        for (a, b), test, p in zip(pairs, tests, adjusted_p_values, strict=True)
    ]


def _sharpe_by_run(returns: DailyReturns, tries: int) -> dict[str, DeflatedSharpe]:
    # The same returns twice say nothing about the variance over tries.
    sharpes = [s for s in map(mean_over_std, returns.distinct().values()) if math.isfinite(s)]
    return {
        run: deflated_sharpe(series, tries, sharpes)
        for run, series in returns.by_run.items()
        if series is not None
    }


def _assess_returns(
    returns: DailyReturns, tries: int
) -> tuple[SelectionTest | None, tuple[str, ...]]:
    """Assess the choice among the different returns; None, and a note why, if there is no choice.

    Without two runs that have returns there is no note either.
    """
    num_runs = sum(series is not None for series in returns.by_run.values())
    distinct = returns.distinct()
    if num_runs < 2:
        return None, ()
    if len(distinct) < 2:
        return None, (
            f"All {num_runs} runs with returns have the same ones: there is no best to choose, so "
            "no probability of overfitting and no p-values are computed.",
        )
    table = pd.DataFrame(distinct)
    if table.dropna().empty:
        return None, (
            "The runs have no bar in common on which all of them have a return, so the choice of "
            "the best of them is not assessed.",
        )
    num_repeated = num_runs - len(distinct)
    notes = (
        f"{num_repeated} of the {num_runs} runs have the same returns as another run; such runs "
        "count once where the choice of the best is assessed.",
    )
    return assess_selection(table, tries=tries), notes if num_repeated else ()
