"""Backtests by Qlib's calls, with Qlib's results: tuples and mappings by frequency."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from qtorch.backtest.positions import Positions
from qtorch.backtest.result import BacktestResult, period_name
from qtorch.backtest.run import Benchmark, backtest
from qtorch.core.errors import ConfigError

BENCHMARK = "SH000300"
DAILY_CASH = 1e8
DAILY_EXCHANGE = {"open_cost": 0.0005, "close_cost": 0.0015, "min_cost": 5}


def backtest_by_frequency(
    start_time: Any,
    end_time: Any,
    strategy: Any,
    executor: Any,
    benchmark: Benchmark = BENCHMARK,
    account: float | Mapping[str, Any] = 1e9,
    exchange_kwargs: Mapping[str, Any] | None = None,
    pos_type: str = "Position",
    *,
    as_qlib: bool = False,
) -> tuple[
    dict[str, tuple[pd.DataFrame, Positions]], dict[str, tuple[pd.DataFrame, BacktestResult]]
]:
    """Run a backtest; return `{"1day": (report, positions)}`, `{"1day": (indicators, result)}`.

    Corresponds to Qlib's `backtest`, with its defaults; `qtorch.backtest.backtest` explains the
    arguments. The positions are by date (`Positions`). Differences: there is one frequency, that of
    the executor; beside the indicators stands the whole result, not Qlib's Indicator.
    """
    if pos_type != "Position":
        raise ConfigError(
            f"pos_type={pos_type!r}: only 'Position' is possible; the cash limits the positions."
        )
    result = backtest(
        start_time,
        end_time,
        strategy,
        executor,
        benchmark,
        account,
        exchange_kwargs,
        as_qlib=as_qlib,
    )
    name = period_name(result.freq)
    return (
        {name: (result.report, result.positions_normal)},
        {name: (result.indicators, result)},
    )


def backtest_daily(
    start_time: Any,
    end_time: Any,
    strategy: Any,
    executor: Any = None,
    account: float | Mapping[str, Any] = DAILY_CASH,
    benchmark: Benchmark = BENCHMARK,
    exchange_kwargs: Mapping[str, Any] | None = None,
    pos_type: str = "Position",
    *,
    as_qlib: bool = False,
) -> tuple[pd.DataFrame, Positions]:
    """Backtest daily bars; return the report and the positions by date.

    Corresponds to `backtest_daily` of qlib/contrib/evaluate.py, with its costs.
    """
    portfolios, _ = backtest_by_frequency(
        start_time,
        end_time,
        strategy,
        executor,
        benchmark,
        account,
        {"freq": "day", **DAILY_EXCHANGE, **(exchange_kwargs or {})},
        pos_type,
        as_qlib=as_qlib,
    )
    return portfolios["1day"]
