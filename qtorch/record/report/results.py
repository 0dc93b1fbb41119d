"""The results of a run that its report shows: scores, labels, daily IC, portfolio."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import pandas as pd

from qtorch.backtest.positions import Positions
from qtorch.core.dates import name_bars
from qtorch.core.errors import LoadObjectError, RecordError, format_count
from qtorch.metrics.portfolio import concentration
from qtorch.metrics.risk import Mode, cumulative_return, periods_per_year, risk_analysis
from qtorch.metrics.signal import ic_decay, quantile_returns, score_autocorrelation
from qtorch.metrics.significance import deflated_sharpe
from qtorch.record.base import has_artifact
from qtorch.record.portfolio import PERIODS, SCORED
from qtorch.record.signal import select_label
from qtorch.tracking.recorder import Recorder, load_if_present

Histories: TypeAlias = Mapping[str, Mapping[int, float]]
TRAINING_PREFIXES = ("train/", "valid/")  # prefixes of the metrics that the training logs by epoch

PORTFOLIO = "portfolio_analysis"
PREFIX = "report."  # of the metrics that the report logs
_REPORT = re.compile(rf"{PORTFOLIO}/report_normal_(.+)\.pkl")


@dataclass(frozen=True)
class RunResults:
    """The artifacts of one run; None for a missing one.

    `score` and `label` are Series by (datetime, instrument), `ic` and `rank_ic` Series by day;
    `report` and `positions` are the frames of PortAnaRecord with frequency `freq`, `periods` the
    number of such bars in a year of its annual figures.
    """

    recorder: Recorder
    score: pd.Series | None
    label: pd.Series | None
    ic: pd.Series | None
    rank_ic: pd.Series | None
    report: pd.DataFrame | None
    positions: pd.DataFrame | None
    freq: str
    periods: float | None = None

    @property
    def weight(self) -> pd.Series | None:
        """The weights of the positions, as fractions of the account."""
        return None if self.positions is None else self.positions["weight"]

    @property
    def has_ic(self) -> bool:
        """Whether IC and Rank IC exist and are defined on some day."""
        return self.ic is not None and self.rank_ic is not None and bool(self.ic.notna().any())


def run_results(recorder: Recorder, label_col: int = 0) -> RunResults:
    """Load the results that exist; the daily backtest if there is one, else the first."""
    freq = _frequency(recorder)
    score, label = (_load_if_present(recorder, name) for name in ("pred.pkl", "label.pkl"))
    return RunResults(
        recorder=recorder,
        score=None if score is None else score.iloc[:, 0],
        label=None if label is None else select_label(label, label_col),
        ic=_load_if_present(recorder, "sig_analysis/ic.pkl"),
        rank_ic=_load_if_present(recorder, "sig_analysis/ric.pkl"),
        report=load_portfolio_report(recorder, freq),
        positions=_load_positions(recorder, freq),
        freq=freq,
        periods=recorder.list_metrics().get(f"{freq}.{PERIODS}"),
    )


def load_portfolio_report(recorder: Recorder, freq: str | None = None) -> pd.DataFrame | None:
    """Load the report of PortAnaRecord of a frequency (default: daily if there is one)."""
    freq = _frequency(recorder) if freq is None else freq
    report: pd.DataFrame | None = _load_if_present(
        recorder, f"{PORTFOLIO}/report_normal_{freq}.pkl"
    )
    return report


def _load_positions(recorder: Recorder, freq: str) -> pd.DataFrame | None:
    """Load the positions of PortAnaRecord; runs of earlier versions have them as a frame."""
    positions = _load_if_present(recorder, f"{PORTFOLIO}/positions_normal_{freq}.pkl")
    return positions.frame if isinstance(positions, Positions) else positions


def has_benchmark(report: pd.DataFrame) -> bool:
    """Whether the report has benchmark returns."""
    return "bench" in report and bool(report["bench"].notna().any())


def benchmark_name(task: Mapping[str, Any]) -> str:
    """Describe the benchmark of a task's backtest: an instrument's name, or what is averaged."""
    records = task.get("record") or []
    for record in [records] if isinstance(records, str | Mapping) else records:
        arguments = record if isinstance(record, Mapping) else {}
        arguments = arguments.get("kwargs") or arguments
        settings = (arguments.get("config") or {}).get("backtest") or {}
        benchmark = settings.get("benchmark", SCORED)
        if isinstance(benchmark, list | tuple):
            return f"the mean of {format_count(len(benchmark), 'instrument')}"
        if benchmark != SCORED:
            return str(benchmark)
    return "the mean of the scored instruments"


def _benchmark(recorder: Recorder) -> str:
    """Name the benchmark of a run's backtest; empty if there is none, or nothing names it."""
    report, task = load_portfolio_report(recorder), load_if_present(recorder, "task")
    if report is None or not has_benchmark(report) or not task:
        return ""
    return benchmark_name(task)


def net_return(report: pd.DataFrame) -> pd.Series:
    """Return the daily returns after cost."""
    return report["return"] - report["cost"]


def net_excess_return(report: pd.DataFrame) -> pd.Series:
    """Return the daily returns after cost, less the benchmark's if there is one."""
    net = net_return(report)
    return net - report["bench"] if has_benchmark(report) else net


def training_histories(recorder: Recorder) -> Histories:
    """Return `{metric: {epoch: value}}` of the metrics that the training logged."""
    names = (n for n in recorder.list_metrics() if n.startswith(TRAINING_PREFIXES))
    return {name: recorder.metric_history(name) for name in names}


def run_description(recorder: Recorder) -> dict[str, str]:
    """Describe a run for its page: model, data, segments, benchmark, seed, ID and start time."""
    params = recorder.list_params()
    description = {
        "Model": model_name(params),
        "Data": _data_description(params),
        "Trained on": _segment_dates(params, "train"),
        "Validated on": _segment_dates(params, "valid"),
        "Tested on": _segment_dates(params, "test"),
        "Benchmark": _benchmark(recorder),
        "Seed": params.get("seed", ""),
        "Run": f"{recorder.name}, {recorder.id}",
        "Experiment": recorder.experiment_name or "",
        "Started": recorder.start_time or "",
    }
    return {name: text for name, text in description.items() if text}


def model_name(params: Mapping[str, str]) -> str:
    """Return the class name of the network, else of the model."""
    return (
        _class_name(params, "model", "network") or _class_name(params, "model") or "unnamed model"
    )


def _class_name(params: Mapping[str, str], *path: str) -> str:
    """Return the class name in a part of the task, in Hydra's or Qlib's form."""
    for separator in (".", ".kwargs."):
        for key in ("_target_", "class"):
            name = params.get(separator.join(path) + f".{key}")
            if name:
                return name.rpartition(".")[2]
    return ""


def _data_description(params: Mapping[str, str]) -> str:
    parts = [
        _class_name(params, "dataset", "handler"),
        _class_name(params, "dataset", "handler", "source"),
        _find_param(params, "provider_uri").rstrip("/").rpartition("/")[2],
        _find_param(params, "handler.instruments", "handler.kwargs.instruments"),
    ]
    return ", ".join(p for p in parts if p)


def _segment_dates(params: Mapping[str, str], name: str) -> str:
    text = _find_param(params, f"segments.{name}")
    dates = re.findall(r"\d{4}-\d\d-\d\d", text)
    return " to ".join(dates) if len(dates) == 2 else text


def _find_param(params: Mapping[str, str], *suffixes: str) -> str:
    return next(
        (v for k, v in params.items() if k.startswith("dataset") and k.endswith(suffixes)), ""
    )


def _frequency(recorder: Recorder) -> str:
    freqs = [m[1] for name in recorder.list_artifacts(PORTFOLIO) if (m := _REPORT.fullmatch(name))]
    return "1day" if "1day" in freqs or not freqs else freqs[0]


def _load_if_present(recorder: Recorder, name: str) -> Any:
    if not has_artifact(recorder, name):
        return None
    try:
        return recorder.load_object(name)
    except LoadObjectError as error:
        raise RecordError(f"the report cannot read {name} of run {recorder.id}: {error}") from error


@dataclass(frozen=True)
class SignalTables:
    """IC by horizon, return by day and score quantile, score autocorrelation by lag and day.

    Horizons and lags count bars; `bars` names these.
    """

    decay: pd.DataFrame
    quantiles: pd.DataFrame
    autocorrelation: Mapping[int, pd.Series]
    bars: str

    @property
    def spread(self) -> pd.Series:
        """Daily return of the highest quantile minus that of the lowest."""
        return self.quantiles.iloc[:, -1] - self.quantiles.iloc[:, 0]

    @property
    def has_quantiles(self) -> bool:
        """Whether some day has enough instruments for the quantiles."""
        return bool(self.quantiles.notna().any(axis=None))


def signal_tables(
    score: pd.Series,
    label: pd.Series,
    horizons: Sequence[int],
    lags: Sequence[int],
    num_quantiles: int,
) -> SignalTables:
    """Compute the tables; horizons and lags too long for the test segment are left out."""
    dates = score.index.get_level_values("datetime").unique()
    num_days = len(dates)
    usable_horizons = [h for h in horizons if h <= max(num_days // 2, 1)]
    by_lag = {lag: score_autocorrelation(score, lag) for lag in lags if lag < num_days}
    return SignalTables(
        decay=ic_decay(score, label, usable_horizons),
        quantiles=quantile_returns(score, label, num_quantiles),
        autocorrelation={lag: daily for lag, daily in by_lag.items() if len(daily)},
        bars=name_bars(dates),
    )


def signal_numbers(tables: SignalTables) -> dict[str, float]:
    """Summarize the tables as metrics: `report.ic_at_horizon.1`, `report.quantile_return.5`, ..."""
    numbers: dict[str, float] = {}
    for horizon, row in tables.decay.iterrows():
        numbers[f"ic_at_horizon.{horizon}"] = row["ic"]
        numbers[f"rank_ic_at_horizon.{horizon}"] = row["rank_ic"]
    for quantile, mean in tables.quantiles.mean().items():
        numbers[f"quantile_return.{quantile}"] = mean
    numbers["quantile_spread"] = float(tables.spread.mean())
    for lag, daily in tables.autocorrelation.items():
        numbers[f"score_autocorrelation.{lag}"] = float(daily.mean())
    return _add_prefix(numbers)


def concentration_table(weight: pd.Series, report: pd.DataFrame) -> pd.DataFrame:
    """Return daily concentration with the share of cash; days without positions have zeros."""
    table = concentration(weight).reindex(report.index)
    filled_columns = ["num_positions", "gross", "net", "largest_weight"]
    table[filled_columns] = table[filled_columns].fillna(0.0)
    return table.assign(cash=report["cash"] / report["account"])


def portfolio_numbers(
    report: pd.DataFrame,
    weight: pd.Series | None,
    freq: str,
    mode: Mode,
    tries: int,
    periods: float | None = None,
) -> dict[str, float]:
    """Compute annual figures with `risk_analysis`, and means over bars of their quantities.

    `periods` is the number of bars per year, by default that of `freq`; it is among the numbers.
    """
    net, gross = net_return(report), report["return"]
    periods = periods_per_year(freq, dates=report.index) if periods is None else periods
    net_risk, gross_risk = (risk_analysis(r, periods, mode=mode)["risk"] for r in (net, gross))
    numbers = {
        PERIODS: periods,
        "total_return": float(cumulative_return(net, "product").iloc[-1]),
        "annualized_return": net_risk["annualized_return"],
        "annualized_return_without_cost": gross_risk["annualized_return"],
        "annualized_volatility": net_risk["std"] * math.sqrt(periods),
        "sharpe_ratio": net_risk["information_ratio"],
        "max_drawdown": net_risk["max_drawdown"],
        "turnover": float(report["turnover"].mean()),
        "annualized_cost": float(report["cost"].mean()) * periods,
    }
    if has_benchmark(report):
        bench = risk_analysis(report["bench"], periods, mode=mode)["risk"]
        numbers["benchmark_annualized_return"] = bench["annualized_return"]
        numbers["benchmark_max_drawdown"] = bench["max_drawdown"]
        excess = risk_analysis(net_excess_return(report), periods, mode=mode)["risk"]
        numbers["excess_annualized_return"] = excess["annualized_return"]
        numbers["excess_information_ratio"] = excess["information_ratio"]
    sharpe = deflated_sharpe(net_excess_return(report), tries)
    if tries > 1:
        numbers |= {"deflated_sharpe": sharpe.probability, "tries": tries}
    else:
        numbers["probabilistic_sharpe"] = sharpe.probability
    if weight is not None:
        means = concentration_table(weight, report).mean()
        names = ("num_positions", "largest_weight", "herfindahl", "effective_positions")
        numbers |= {name: means[name] for name in names} | {"cash_share": means["cash"]}
    return _add_prefix(numbers)


def log_numbers(recorder: Recorder, numbers: Mapping[str, float]) -> None:
    """Log the numbers that are new or changed; a second report of the same run adds nothing.

    A changed number (after another backtest) becomes the next step of its metric.
    """
    logged_metrics = recorder.list_metrics()
    recorder.log_batch({k: v for k, v in numbers.items() if logged_metrics.get(k) != v})


def _add_prefix(numbers: Mapping[str, float]) -> dict[str, float]:
    """Add the report's prefix to the names; drop undefined numbers."""
    return {PREFIX + k: float(v) for k, v in numbers.items() if math.isfinite(v)}
