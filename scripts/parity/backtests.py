"""Our backtest beside real Qlib's on the same scores and bars, setting by setting."""

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
    """What Qlib found for one setting."""

    report: pd.DataFrame
    positions: pd.DataFrame
    orders: pd.DataFrame
    indicators: pd.DataFrame


@dataclass(frozen=True)
class Row:
    """The comparison of one setting: the worst relative difference of the account's value, of a
    position's amount and of an order's cost, and the number of days whose holdings differ."""

    name: str
    days: int
    cells: int
    account: float
    amount: float
    cost: float
    other_days: int

    @property
    def passes(self) -> bool:
        """Every figure within the tolerance, the same names held every day."""
        return not self.other_days and max(self.account, self.amount, self.cost) <= TOLERANCE


def ask_qlib(
    python: str,
    provider: str,
    scores: pd.Series,
    span: tuple[str, str],
    asked: Sequence[Case],
    folder: Path,
    *,
    benchmark: str,
    codes: str = "all",
    mended: bool = False,
) -> list[Answer]:
    """Run real Qlib over the settings; its answers in their order.

    `mended`: with the strategy's faults repaired (`qlib_backtest.py` says which).
    """
    job = {
        "provider": provider,
        "scores": str(folder / "scores.pkl"),
        "start": span[0],
        "end": span[1],
        "account": CASH,
        "benchmark": benchmark,
        "codes": codes,
        "cases": list(asked),
        "mended": mended,
    }
    scores.to_pickle(job["scores"])
    (folder / "job.json").write_text(json.dumps(job))
    script = Path(__file__).with_name("qlib_backtest.py")
    done = subprocess.run(
        [python, str(script), str(folder / "job.json"), str(folder)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    kinds = ("report", "positions", "orders", "indicators")
    return [
        Answer(*(pd.read_parquet(folder / f"{k}.{kind}.parquet") for kind in kinds))
        for k in range(len(asked))
    ]


def ours(
    provider: str,
    scores: pd.Series,
    span: tuple[str, str],
    case: Case,
    *,
    benchmark: str,
    codes: str = "all",
) -> BacktestResult:
    """Our backtest of a setting."""
    return backtest(
        *span,
        TopkDropoutStrategy(signal=scores, **strategy_kwargs(case)),
        account=CASH,
        benchmark=benchmark,
        exchange_kwargs={
            "exchange": Exchange(codes=codes, source=QlibSource(provider), **exchange_kwargs(case))
        },
    )


def compare(name: str, own: BacktestResult, theirs: Answer) -> Row:
    """One setting: every day's account, every position and every order's cost."""
    report = own.report
    assert list(report.columns) == list(theirs.report.columns), (report.columns, theirs.report)
    account = _worst(report["account"].to_numpy(), theirs.report["account"].to_numpy())
    columns = max(
        _worst(report[c].to_numpy(), theirs.report[c].to_numpy().astype(float), 1e-9)
        for c in report.columns
    )
    held = theirs.positions.set_index(["datetime", "instrument"]).sort_index()
    mine = own.positions.sort_index()
    both = mine.join(held, how="outer", lsuffix="_own", rsuffix="_qlib")
    lost = both[["amount_own", "amount_qlib"]].isna().any(axis=1)
    other_days = both.index[lost].get_level_values(0).nunique()
    both = both[~lost]
    amount = max(
        _worst(both[f"{c}_own"].to_numpy(), both[f"{c}_qlib"].to_numpy())
        for c in ("amount", "price", "count", "weight")
    )
    cost = _orders(own, theirs)
    cells = report.size + 4 * len(both) + 3 * len(theirs.orders)
    return Row(name, len(report), cells, max(account, columns), amount, cost, other_days)


def _orders(own: BacktestResult, theirs: Answer) -> float:
    asked = theirs.orders.set_index(["datetime", "instrument"]).sort_index()
    mine = own.orders.sort_index()
    sign = np.where(mine["direction"] == "buy", 1.0, -1.0)
    if not mine.index.equals(asked.index):
        return np.inf
    pairs = (
        (sign * mine["amount"], asked["amount"]),
        (sign * mine["deal_amount"], asked["deal_amount"]),
        (mine["cost"], asked["cost"]),
    )
    counts = theirs.indicators.reindex(own.indicators.index)
    indicators = max(
        _worst(own.indicators[c].to_numpy(), counts[c].to_numpy(), 1e-9)
        for c in ("ffr", "deal_amount", "value", "count")
    )
    return max(indicators, *(_worst(a.to_numpy(), b.to_numpy(), 1e-6) for a, b in pairs))


def _worst(own: np.ndarray, theirs: np.ndarray, floor: float = 0.0) -> float:
    """The largest relative difference; `floor` is the size below which it counts as absolute."""
    if not len(own):
        return 0.0
    if not np.array_equal(np.isnan(own), np.isnan(theirs)):
        return float("inf")
    scale = np.maximum(np.abs(theirs), floor)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.abs(own - theirs) / scale
    return float(np.nan_to_num(found[own != theirs], nan=0.0).max(initial=0.0))
