"""Compare qtorch's backtest with Qlib's on the same scores and bars, for each setting."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from backtest_cases import Case, exchange_kwargs, strategy_kwargs

from qtorch.backtest import BacktestResult, Exchange, TopkDropoutStrategy, backtest
from qtorch.data import QlibSource

TOLERANCE = 1e-6
CASH = 1e8


@dataclass(frozen=True)
class Answer:
    """Qlib's result for one setting."""

    report: pd.DataFrame
    positions: pd.DataFrame
    orders: pd.DataFrame
    indicators: pd.DataFrame


@dataclass(frozen=True)
class Row:
    """The comparison of one setting.

    `account`, `amount` and `cost` are the largest relative differences of the report, of the
    positions and of the orders; `differing_days` counts days with different holdings.
    """

    name: str
    days: int
    cells: int
    account: float
    amount: float
    cost: float
    differing_days: int

    @property
    def passes(self) -> bool:
        """Whether all numbers are within the tolerance and all holdings are the same."""
        return not self.differing_days and max(self.account, self.amount, self.cost) <= TOLERANCE


def ask_qlib(
    python: str,
    provider: str,
    scores: pd.Series,
    span: tuple[str, str],
    settings: Sequence[Case],
    folder: Path,
    *,
    benchmark: str,
    codes: str = "all",
    repair_faults: bool = False,
    script: str = "qlib_backtest.py",
) -> list[Answer]:
    """Run Qlib on the settings and return its results in the same order.

    `repair_faults`: repair the strategy's bugs first (`qlib_backtest.py` lists them). `script` runs
    it, in this folder.
    """
    job = {
        "provider": provider,
        "scores": str(folder / "scores.pkl"),
        "start": span[0],
        "end": span[1],
        "account": CASH,
        "benchmark": benchmark,
        "codes": codes,
        "cases": list(settings),
        "repair_faults": repair_faults,
    }
    scores.to_pickle(job["scores"])
    (folder / "job.json").write_text(json.dumps(job))
    process = subprocess.run(
        [python, str(Path(__file__).with_name(script)), str(folder / "job.json"), str(folder)],
        capture_output=True,
        text=True,
    )
    if process.returncode:
        raise RuntimeError(process.stderr[-3000:])
    kinds = ("report", "positions", "orders", "indicators")
    return [
        Answer(*(pd.read_parquet(folder / f"{k}.{kind}.parquet") for kind in kinds))
        for k in range(len(settings))
    ]


def run_qtorch(
    provider: str,
    scores: pd.Series,
    span: tuple[str, str],
    case: Case,
    *,
    benchmark: str,
    codes: str = "all",
) -> BacktestResult:
    """Run qtorch's backtest of a setting."""
    return backtest(
        *span,
        TopkDropoutStrategy(signal=scores, **strategy_kwargs(case)),
        account=CASH,
        benchmark=benchmark,
        exchange_kwargs={
            "exchange": Exchange(codes=codes, source=QlibSource(provider), **exchange_kwargs(case))
        },
        as_qlib=True,
    )


def compare(name: str, result: BacktestResult, qlib_result: Answer) -> Row:
    """Compare every day's report, every position and every order of one setting."""
    report = result.report
    assert list(report.columns) == list(qlib_result.report.columns), (
        report.columns,
        qlib_result.report,
    )
    account = _max_difference(
        report["account"].to_numpy(), qlib_result.report["account"].to_numpy()
    )
    columns = max(
        _max_difference(report[c].to_numpy(), qlib_result.report[c].to_numpy().astype(float), 1e-9)
        for c in report.columns
    )
    qlib_positions = qlib_result.positions.set_index(["datetime", "instrument"]).sort_index()
    positions = result.positions.sort_index()
    joined_positions = positions.join(qlib_positions, how="outer", lsuffix="_own", rsuffix="_qlib")
    is_missing = joined_positions[["amount_own", "amount_qlib"]].isna().any(axis=1)
    differing_days = joined_positions.index[is_missing].get_level_values(0).nunique()
    joined_positions = joined_positions[~is_missing]
    amount = max(
        _max_difference(
            joined_positions[f"{c}_own"].to_numpy(), joined_positions[f"{c}_qlib"].to_numpy()
        )
        for c in ("amount", "price", "count", "weight")
    )
    cost = _compare_orders(result, qlib_result)
    cells = report.size + 4 * len(joined_positions) + 3 * len(qlib_result.orders)
    return Row(name, len(report), cells, max(account, columns), amount, cost, differing_days)


def _compare_orders(result: BacktestResult, qlib_result: Answer) -> float:
    qlib_orders = qlib_result.orders.set_index(["datetime", "instrument"]).sort_index()
    orders = result.orders.sort_index()
    sign = np.where(orders["direction"] == "buy", 1.0, -1.0)
    if not orders.index.equals(qlib_orders.index):
        return np.inf
    pairs = (
        (sign * orders["amount"], qlib_orders["amount"]),
        (sign * orders["deal_amount"], qlib_orders["deal_amount"]),
        (orders["cost"], qlib_orders["cost"]),
    )
    qlib_indicators = qlib_result.indicators.reindex(result.indicators.index)
    indicators = max(
        _max_difference(result.indicators[c].to_numpy(), qlib_indicators[c].to_numpy(), 1e-9)
        for c in ("ffr", "deal_amount", "value", "count")
    )
    return max(indicators, *(_max_difference(a.to_numpy(), b.to_numpy(), 1e-6) for a, b in pairs))


def _max_difference(values: np.ndarray, qlib_values: np.ndarray, floor: float = 0.0) -> float:
    """The largest relative difference; for values below `floor` it is relative to `floor`."""
    if not len(values):
        return 0.0
    if not np.array_equal(np.isnan(values), np.isnan(qlib_values)):
        return float("inf")
    scale = np.maximum(np.abs(qlib_values), floor)
    with np.errstate(divide="ignore", invalid="ignore"):
        difference = np.abs(values - qlib_values) / scale
    return float(np.nan_to_num(difference[values != qlib_values], nan=0.0).max(initial=0.0))
