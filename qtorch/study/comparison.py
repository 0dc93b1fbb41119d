"""Several runs side by side: seeds of one setting as a group, and what chance alone would do."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import pandas as pd

from qtorch.core.errors import ConfigError, LoadObjectError
from qtorch.metrics.paired import PairedTest, holm, paired_test
from qtorch.metrics.sharpe import DeflatedSharpe, deflated_sharpe
from qtorch.metrics.signal import mean_over_std
from qtorch.record.run_results import (
    RunResults,
    has_benchmark,
    judged_return,
    model_name,
    net_return,
    run_results,
)
from qtorch.tracking.mlflow_recorder import COMMAND_PARAM
from qtorch.tracking.recorder import Recorder

SEED_PARAMS = ("seed", "model.seed", "model.kwargs.seed")
LONG_SHORT = "half of (top fifth − bottom fifth by score), before cost"
MOST_NAMED = 3  # params in a group's name
SERIES = {"ic": "Daily IC", "rank_ic": "Daily Rank IC", "returns": "Daily return"}


@dataclass(frozen=True)
class ComparedRun:
    """One run: its metrics and params, and by day its IC, Rank IC and return (None: not held)."""

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
    """Runs whose params are equal but for the seed, under a name of what sets them apart."""

    name: str
    runs: tuple[ComparedRun, ...]

    def mean_and_std(self, metric: str) -> tuple[float, float]:
        """Over its runs (ddof 1; NaN for one run); NaN where one of them lacks the metric."""
        values = pd.Series([r.metrics.get(metric, math.nan) for r in self.runs])
        if values.isna().any():
            return math.nan, math.nan
        return float(values.mean()), float(values.std(ddof=1))

    def by_run(self, series: str) -> pd.DataFrame:
        """A daily series ("ic", "rank_ic", "returns") of each run: days by run ids."""
        held = {r.id: getattr(r, series) for r in self.runs}
        return pd.DataFrame({k: v for k, v in held.items() if v is not None}).sort_index()

    def daily(self, series: str) -> pd.Series:
        """The mean over the runs of a daily series, on the days that all of them have."""
        table = self.by_run(series).dropna()
        return table.mean(axis=1)


@dataclass(frozen=True)
class GroupTest:
    """Two groups' daily series compared; `adjusted` is the p-value for so many comparisons."""

    series: str
    first: str
    second: str
    test: PairedTest
    adjusted: float


@dataclass(frozen=True)
class Comparison:
    """What is known of several runs. `sharpe` is by run id, each judged as the best of `tries`."""

    groups: tuple[RunGroup, ...]
    tests: tuple[GroupTest, ...]
    sharpe: Mapping[str, DeflatedSharpe]
    tries: int
    returns_of: str

    @property
    def runs(self) -> list[ComparedRun]:
        """All runs, group by group."""
        return [run for group in self.groups for run in group.runs]


def compare_runs(recorders: Sequence[Recorder], *, tries: int | None = None) -> Comparison:
    """Compare runs by their artifacts and metrics.

    A run's daily return is its portfolio's after cost, in excess of the benchmark where there is
    one; if not every run has a portfolio, that of its long-short quantiles (before cost). Groups
    are compared by the mean of their runs, day by day (`paired_test`); p-values are adjusted by
    Holm over the pairs of a series. `tries` is the number of strategies that were tried in all: by
    default the runs given; the deflated Sharpe ratio needs it stated honestly.
    """
    recorders = list({r.id: r for r in recorders}.values())
    if len(recorders) < 2:
        raise ConfigError(f"a comparison needs two different runs; got {len(recorders)}.")
    held = [run_results(r) for r in recorders]
    daily, told = _returns(recorders, held)
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
        for recorder, results, returns in zip(recorders, held, daily, strict=True)
    ]
    number = len(runs) if tries is None else tries
    if number < len(runs):
        raise ConfigError(f"tries={tries}, but {len(runs)} runs are compared: each was a try.")
    groups = grouped(runs)
    return Comparison(
        groups=groups,
        tests=tuple(t for series in SERIES for t in _tests(groups, series)),
        sharpe=_sharpes(runs, number),
        tries=number,
        returns_of=told,
    )


def grouped(runs: Sequence[ComparedRun]) -> tuple[RunGroup, ...]:
    """Groups of equal params other than the seed, in the order of their first runs."""
    by_params: dict[frozenset[tuple[str, str]], list[ComparedRun]] = {}
    for run in runs:
        by_params.setdefault(frozenset(_setting(run.params).items()), []).append(run)
    settings = [dict(key) for key in by_params]
    names = _names(settings)
    return tuple(
        RunGroup(name, tuple(members))
        for name, members in zip(names, by_params.values(), strict=True)
    )


def differing(groups: Sequence[RunGroup]) -> dict[str, list[str]]:
    """The params that are not equal in all groups: `{param: [value by group]}`."""
    settings = [_setting(g.runs[0].params) for g in groups]
    keys = sorted({k for s in settings for k in s})
    table = {k: [s.get(k, "") for s in settings] for k in keys}
    return {k: values for k, values in table.items() if len(set(values)) > 1}


def _setting(params: Mapping[str, str]) -> dict[str, str]:
    """What a run was told to do: no seed, no command line, nothing about the machine."""
    return {k: v for k, v in params.items() if k not in SEED_PARAMS and not _is_origin(k)}


def _is_origin(key: str) -> bool:
    return key == COMMAND_PARAM or key.startswith("QTORCH_")


def _names(settings: Sequence[Mapping[str, str]]) -> list[str]:
    models = [model_name(s) for s in settings]
    shared = sorted(set.intersection(*(set(s) for s in settings)))
    varied = [k for k in shared if len({s[k] for s in settings}) > 1 and not _is_class(k)]
    names = []
    for model, setting in zip(models, settings, strict=True):
        parts = [model] if len(set(models)) > 1 or not varied else []
        parts += [f"{k.rpartition('.')[2]}={_short(setting[k])}" for k in varied[:MOST_NAMED]]
        names.append(", ".join(parts))
    count, seen = Counter(names), Counter[str]()
    for k, name in enumerate(names):
        if count[name] > 1:  # what differs is in none of the shared params
            seen[name] += 1
            names[k] = f"{name} ({seen[name]})"
    return names


def _is_class(key: str) -> bool:
    return key.endswith(("._target_", ".class", ".module_path"))


def _short(value: str) -> str:
    return value if len(value) <= 24 else value[:23] + "…"


def _returns(
    recorders: Sequence[Recorder], held: Sequence[RunResults]
) -> tuple[list[pd.Series | None], str]:
    """The same kind of daily return of every run, and its name."""
    reports = [r.report for r in held if r.report is not None]
    if len(reports) < len(held):
        return [_long_short(r) for r in recorders], LONG_SHORT
    if all(has_benchmark(r) for r in reports):
        return [judged_return(r) for r in reports], "portfolio after cost less benchmark"
    return [net_return(r) for r in reports], "portfolio after cost"


def _long_short(recorder: Recorder) -> pd.Series | None:
    try:
        series: pd.Series = recorder.load_object("sig_analysis/long_short_r.pkl")
    except LoadObjectError:
        return None
    return series


def _tests(groups: Sequence[RunGroup], series: str) -> list[GroupTest]:
    daily = {g.name: g.daily(series) for g in groups}
    pairs = [(a, b) for a, b in combinations(daily, 2) if len(daily[a]) and len(daily[b])]
    found = [paired_test(daily[a], daily[b]) for a, b in pairs]
    adjusted = holm([t.p_value for t in found])
    return [
        GroupTest(series, a, b, test, p)
        for (a, b), test, p in zip(pairs, found, adjusted, strict=True)
    ]


def _sharpes(runs: Sequence[ComparedRun], tries: int) -> dict[str, DeflatedSharpe]:
    held = {r.id: r.returns for r in runs if r.returns is not None}
    known = [s for s in map(mean_over_std, held.values()) if math.isfinite(s)]
    return {run: deflated_sharpe(returns, tries, known) for run, returns in held.items()}
