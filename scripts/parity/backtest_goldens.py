"""Write tests/golden/qlib_backtests.npz: Qlib's backtests on the synthetic market.

    python scripts/parity/backtest_goldens.py PYTHON_WITH_PYQLIB OUT.npz

The test generates the market and the scores itself; the file contains only Qlib's results, with
those slices of its strategy repaired that go wrong when the portfolio is too full.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from backtest_cases import Case, cases, scores
from backtests import Answer, ask_qlib

from qtorch.data import SyntheticSource
from qtorch.data.source import write_qlib

SPAN = ("2019-03-01", "2019-07-31")
BENCHMARK = "MARKET"
FIELDS = ("account", "cash", "total_cost", "total_turnover", "return", "bench")


def golden_market() -> SyntheticSource:
    """Forty volatile instruments that hit limits; some are listed late, some suspended."""
    return SyntheticSource(40, "2019-01-01", "2019-08-30", seed=3)


def golden_scores(market: SyntheticSource) -> pd.Series:
    """Scores of the market's stocks, starting before the first trading day."""
    calendar = market.calendar("2019-02-20", "2019-08-10")
    return scores(calendar, sorted(market.instruments("stocks")), seed=1)


def golden_cases() -> list[Case]:
    """Twenty-six settings, with limits of 3% so that they take effect."""
    selected_cases = cases(26, seed=2, topk=(3, 6, 10))
    return [{**c, "limit_threshold": c["limit_threshold"] and 0.03} for c in selected_cases]


def pack(number: int, answer: Answer, calendar: pd.DatetimeIndex, names: list[str]) -> dict:
    """Pack a result into small arrays; positions and orders as (day, instrument) indices."""
    positions = answer.positions
    orders = answer.orders
    return {
        f"{number}/report": answer.report[list(FIELDS)].to_numpy(dtype=np.float64),
        f"{number}/held": np.stack(
            [
                calendar.get_indexer(positions["datetime"]),
                [names.index(i) for i in positions["instrument"]],
            ]
        ).astype(np.int16),
        f"{number}/amount": positions["amount"].to_numpy(dtype=np.float64),
        f"{number}/count": positions["count"].to_numpy(dtype=np.int16),
        f"{number}/asked": np.stack(
            [
                calendar.get_indexer(orders["datetime"]),
                [names.index(i) for i in orders["instrument"]],
            ]
        ).astype(np.int16),
        f"{number}/dealt": orders["deal_amount"].to_numpy(dtype=np.float64),
        f"{number}/cost": orders["cost"].to_numpy(dtype=np.float64),
    }


def main(python: str, out: str) -> None:
    market = golden_market()
    names = sorted(market.instruments("all"))
    calendar = market.calendar(*SPAN)
    arrays: dict = {}
    with tempfile.TemporaryDirectory() as folder:
        provider = str(write_qlib(market, Path(folder) / "market"))
        answers = ask_qlib(
            python,
            provider,
            golden_scores(market),
            SPAN,
            golden_cases(),
            Path(folder),
            benchmark=BENCHMARK,
            repair_faults=True,
        )
    for number, answer in enumerate(answers):
        arrays |= pack(number, answer, calendar, names)
    np.savez_compressed(out, **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
