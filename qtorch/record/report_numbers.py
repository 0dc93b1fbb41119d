"""The numbers of a report beyond those that other records log: tables, and metrics `report.*`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from qtorch.metrics.curve import Mode, cumulative_return
from qtorch.metrics.decay import ic_decay, score_autocorrelation
from qtorch.metrics.holdings import concentration
from qtorch.metrics.quantile import quantile_returns
from qtorch.metrics.risk import periods_per_year, risk_analysis
from qtorch.metrics.sharpe import deflated_sharpe
from qtorch.record.run_results import has_benchmark, judged_return, net_return
from qtorch.tracking.recorder import Recorder

PREFIX = "report."


@dataclass(frozen=True)
class SignalTables:
    """IC by horizon; return by day and quantile; rank correlation of the scores by lag and day."""

    decay: pd.DataFrame
    quantiles: pd.DataFrame
    autocorrelation: Mapping[int, pd.Series]

    @property
    def spread(self) -> pd.Series:
        """The highest quantile's return less the lowest's, by day."""
        return self.quantiles.iloc[:, -1] - self.quantiles.iloc[:, 0]


def signal_tables(
    score: pd.Series,
    label: pd.Series,
    horizons: Sequence[int],
    lags: Sequence[int],
    num_quantiles: int,
) -> SignalTables:
    """All of them; horizons and lags that the test segment is too short for are left out."""
    num_days = score.index.get_level_values("datetime").nunique()
    inside = [h for h in horizons if h <= max(num_days // 2, 1)]
    by_lag = {lag: score_autocorrelation(score, lag) for lag in lags if lag < num_days}
    return SignalTables(
        decay=ic_decay(score, label, inside),
        quantiles=quantile_returns(score, label, num_quantiles),
        autocorrelation={lag: daily for lag, daily in by_lag.items() if len(daily)},
    )


def signal_numbers(tables: SignalTables) -> dict[str, float]:
    """What the tables come to: `report.ic_at_horizon.1`, `report.quantile_return.5`, ..."""
    numbers: dict[str, float] = {}
    for horizon, row in tables.decay.iterrows():
        numbers[f"ic_at_horizon.{horizon}"] = row["ic"]
        numbers[f"rank_ic_at_horizon.{horizon}"] = row["rank_ic"]
    for quantile, mean in tables.quantiles.mean().items():
        numbers[f"quantile_return.{quantile}"] = mean
    numbers["quantile_spread"] = float(tables.spread.mean())
    for lag, daily in tables.autocorrelation.items():
        numbers[f"score_autocorrelation.{lag}"] = float(daily.mean())
    return _named(numbers)


def spread_of(weight: pd.Series, report: pd.DataFrame) -> pd.DataFrame:
    """Concentration on each day of the report, with the share of cash; no positions are 0."""
    table = concentration(weight).reindex(report.index)
    empty = ["num_positions", "gross", "net", "largest_weight"]
    table[empty] = table[empty].fillna(0.0)
    return table.assign(cash=report["cash"] / report["account"])


def portfolio_numbers(
    report: pd.DataFrame, weight: pd.Series | None, freq: str, mode: Mode, tries: int
) -> dict[str, float]:
    """Annual figures by `risk_analysis`, means over days of what is by day."""
    net, gross = net_return(report), report["return"]
    risk, before = (risk_analysis(r, freq=freq, mode=mode)["risk"] for r in (net, gross))
    periods = periods_per_year(freq)
    numbers = {
        "total_return": float(cumulative_return(net, "product").iloc[-1]),
        "annualized_return": risk["annualized_return"],
        "annualized_return_without_cost": before["annualized_return"],
        "annualized_volatility": risk["std"] * math.sqrt(periods),
        "sharpe_ratio": risk["information_ratio"],
        "max_drawdown": risk["max_drawdown"],
        "turnover": float(report["turnover"].mean()),
        "annualized_cost": float(report["cost"].mean()) * periods,
    }
    if has_benchmark(report):
        bench = risk_analysis(report["bench"], freq=freq, mode=mode)["risk"]
        numbers["benchmark_annualized_return"] = bench["annualized_return"]
        numbers["benchmark_max_drawdown"] = bench["max_drawdown"]
    sure = deflated_sharpe(judged_return(report), tries)
    if tries > 1:
        numbers |= {"deflated_sharpe": sure.probability, "tries": tries}
    else:
        numbers["probabilistic_sharpe"] = sure.probability
    if weight is not None:
        means = spread_of(weight, report).mean()
        numbers |= {
            "num_positions": means["num_positions"],
            "largest_weight": means["largest_weight"],
            "herfindahl": means["herfindahl"],
            "effective_positions": means["effective_positions"],
            "cash_share": means["cash"],
        }
    return _named(numbers)


def log_numbers(recorder: Recorder, numbers: Mapping[str, float]) -> None:
    """Log what is new or has changed; a second report of the same run adds nothing.

    A changed number (another backtest since) becomes the metric's next step, its newest value.
    """
    there = recorder.list_metrics()
    recorder.log_batch({k: v for k, v in numbers.items() if there.get(k) != v})


def _named(numbers: Mapping[str, float]) -> dict[str, float]:
    """Under the report's prefix; what is undefined is left out."""
    return {PREFIX + k: float(v) for k, v in numbers.items() if math.isfinite(v)}
