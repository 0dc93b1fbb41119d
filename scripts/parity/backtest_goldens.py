"""Make tests/golden/qlib_backtests.npz: real Qlib's backtests on the synthetic market.

    python scripts/parity/backtest_goldens.py PYTHON_WITH_PYQLIB OUT.npz

The market and the scores are made again by the test; the file holds Qlib's results alone, those of
its strategy with the slices repaired that go wrong when it holds too much.
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
    """Forty wild instruments: limits are hit, some are listed late, some suspended."""
    return SyntheticSource(40, "2019-01-01", "2019-08-30", seed=3)


def golden_scores(market: SyntheticSource) -> pd.Series:
    """Scores of the market's stocks from before the first day on."""
    calendar = market.calendar("2019-02-20", "2019-08-10")
    return scores(calendar, sorted(market.instruments("stocks")), seed=1)


def golden_cases() -> list[Case]:
    """Twenty-six settings, limits at 3% so that they bind."""
    found = cases(26, seed=2, topk=(3, 6, 10))
    return [{**c, "limit_threshold": c["limit_threshold"] and 0.03} for c in found]


def pack(number: int, answer: Answer, calendar: pd.DatetimeIndex, names: list[str]) -> dict:
    """An answer as small arrays."""
    held = answer.positions
    asked = answer.orders
    return {
        f"{number}/report": answer.report[list(FIELDS)].to_numpy(dtype=np.float64),
        f"{number}/held": np.stack(
            [calendar.get_indexer(held["datetime"]), [names.index(i) for i in held["instrument"]]]
        ).astype(np.int16),
        f"{number}/amount": held["amount"].to_numpy(dtype=np.float64),
        f"{number}/count": held["count"].to_numpy(dtype=np.int16),
        f"{number}/asked": np.stack(
            [calendar.get_indexer(asked["datetime"]), [names.index(i) for i in asked["instrument"]]]
        ).astype(np.int16),
        f"{number}/dealt": asked["deal_amount"].to_numpy(dtype=np.float64),
        f"{number}/cost": asked["cost"].to_numpy(dtype=np.float64),
    }


def main(python: str, out: str) -> None:
    market = golden_market()
    names = sorted(market.instruments("all"))
    calendar = market.calendar(*SPAN)
    stored: dict = {}
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
            mended=True,
        )
    for number, answer in enumerate(answers):
        stored |= pack(number, answer, calendar, names)
    np.savez_compressed(out, **stored)


if __name__ == "__main__":
    main(*sys.argv[1:])
