"""Computes the report's own numbers, which no other record logs: tables and `report.*` metrics."""

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
from qtorch.record.run_results import has_benchmark, net_excess_return, net_return
from qtorch.tracking.recorder import Recorder

PREFIX = "report."


@dataclass(frozen=True)
class SignalTables:
    """IC by horizon, return by day and score quantile, score autocorrelation by lag and day."""

    decay: pd.DataFrame
    quantiles: pd.DataFrame
    autocorrelation: Mapping[int, pd.Series]

    @property
    def spread(self) -> pd.Series:
        """Daily return of the highest quantile minus that of the lowest."""
        return self.quantiles.iloc[:, -1] - self.quantiles.iloc[:, 0]


def signal_tables(
    score: pd.Series,
    label: pd.Series,
    horizons: Sequence[int],
    lags: Sequence[int],
    num_quantiles: int,
) -> SignalTables:
    """Compute the tables; horizons and lags too long for the test segment are left out."""
    num_days = score.index.get_level_values("datetime").nunique()
    usable_horizons = [h for h in horizons if h <= max(num_days // 2, 1)]
    by_lag = {lag: score_autocorrelation(score, lag) for lag in lags if lag < num_days}
    return SignalTables(
        decay=ic_decay(score, label, usable_horizons),
        quantiles=quantile_returns(score, label, num_quantiles),
        autocorrelation={lag: daily for lag, daily in by_lag.items() if len(daily)},
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
    report: pd.DataFrame, weight: pd.Series | None, freq: str, mode: Mode, tries: int
) -> dict[str, float]:
    """Compute annual figures with `risk_analysis`, and means over days of daily quantities."""
    net, gross = net_return(report), report["return"]
    net_risk, gross_risk = (risk_analysis(r, freq=freq, mode=mode)["risk"] for r in (net, gross))
    periods = periods_per_year(freq)
    numbers = {
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
        bench = risk_analysis(report["bench"], freq=freq, mode=mode)["risk"]
        numbers["benchmark_annualized_return"] = bench["annualized_return"]
        numbers["benchmark_max_drawdown"] = bench["max_drawdown"]
    sharpe = deflated_sharpe(net_excess_return(report), tries)
    if tries > 1:
        numbers |= {"deflated_sharpe": sharpe.probability, "tries": tries}
    else:
        numbers["probabilistic_sharpe"] = sharpe.probability
    if weight is not None:
        means = concentration_table(weight, report).mean()
        numbers |= {
            "num_positions": means["num_positions"],
            "largest_weight": means["largest_weight"],
            "herfindahl": means["herfindahl"],
            "effective_positions": means["effective_positions"],
            "cash_share": means["cash"],
        }
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
