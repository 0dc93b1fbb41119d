"""Bugs of Qlib's TopkDropoutStrategy and Account that qtorch does not have, on hand-worked cases.

    python scripts/parity/backtest_faults.py PYTHON_WITH_PYQLIB

All prices are always 10, so that only the holdings matter.

- `n_drop=0`: `list(comb)[-0:]` is the whole list, so all holdings are sold.
- Too full: with more than topk + n_drop holdings the number of candidates is negative, and
  `list[:-2]` makes all but two instruments of the market candidates, without free slots.
- `only_tradable`: if the number of candidates is 0, its loop takes one before checking.
- Holdings without a score are sold first; without candidates their order is that of a set of
  strings, so that runs of the same backtest sell different ones (PYTHONHASHSEED).
- An initial portfolio: the first day's return reports its whole value as a profit.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
from faults import Fault

from qtorch.backtest import TopkDropoutStrategy, backtest
from qtorch.data import QlibSource
from qtorch.data.source import FrameSource, write_qlib

NAMES = "ABCDEFGHI"
DAYS = pd.bdate_range("2020-01-01", periods=6)
START, END = "2020-01-02", "2020-01-03"


def market() -> FrameSource:
    """Nine instruments with a constant price of 10."""
    index = pd.MultiIndex.from_product([DAYS, list(NAMES)], names=["datetime", "instrument"])
    bars = {"open": 10.0, "close": 10.0, "volume": 1e6, "factor": 1.0, "change": 0.0}
    return FrameSource(pd.DataFrame(bars, index=index))


def scores(order: str) -> list[tuple[str, str, float]]:
    """Scores of the first two days, best first; instruments not in `order` have no score."""
    return [(f"{d:%Y-%m-%d}", n, -float(k)) for d in DAYS[:2] for k, n in enumerate(order)]


def initial_account(names: str) -> dict[str, Any]:
    """An account with 100 shares of each instrument and almost no cash."""
    return {"cash": 1.0, **{n: {"amount": 100, "price": 10.0} for n in names}}


CASES: dict[str, dict[str, Any]] = {
    "n_drop of 0": {
        "scores": scores("ABCDEFGHI"),
        "account": {"cash": 1000.0},
        "strategy": {"topk": 2, "n_drop": 0},
    },
    "too full": {
        "scores": scores("IHGFEDCBA"),
        "account": initial_account("ABCDE"),
        "strategy": {"topk": 2, "n_drop": 1, "hold_thresh": 0},
    },
    "only_tradable without room": {
        "scores": scores("ABCDEFGHI"),
        "account": initial_account("ABC"),
        "strategy": {"topk": 2, "n_drop": 1, "hold_thresh": 0, "only_tradable": True},
    },
    "held without scores": {
        "scores": scores("IHG"),
        "account": initial_account("ABCD"),
        "strategy": {"topk": 3, "n_drop": 1, "hold_thresh": 0},
    },
}


def jobs(provider: str) -> list[dict[str, Any]]:
    """The cases as job descriptions for the Qlib script."""
    return [{"provider": provider, "start": START, "end": END, **case} for case in CASES.values()]


def ask_qlib(python: str, provider: str, hash_seed: int = 0) -> dict[str, dict[str, Any]]:
    """Qlib's results by case."""
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder, "job.json")
        job.write_text(json.dumps(jobs(provider)))
        script = Path(__file__).with_name("qlib_backtest_faults.py")
        process = subprocess.run(
            [python, str(script), str(job)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONHASHSEED": str(hash_seed)},
        )
    if process.returncode:
        raise RuntimeError(f"Qlib's side failed:\n{process.stderr[-3000:]}")
    return dict(zip(CASES, json.loads(process.stdout.splitlines()[-1]), strict=True))


def run_qtorch(provider: str) -> dict[str, dict[str, Any]]:
    """qtorch's results by case."""
    results = {}
    for name, case in CASES.items():
        rows = pd.DataFrame(case["scores"], columns=["datetime", "instrument", "score"])
        rows["datetime"] = pd.to_datetime(rows["datetime"])
        result = backtest(
            START,
            END,
            TopkDropoutStrategy(
                signal=rows.set_index(["datetime", "instrument"])["score"], **case["strategy"]
            ),
            account=case["account"],
            exchange_kwargs={
                "source": QlibSource(provider),
                **dict.fromkeys(("open_cost", "close_cost", "min_cost"), 0.0),
                "trade_unit": None,
            },
        )
        days = result.positions.reset_index().groupby("datetime")["instrument"]
        names = days.apply(sorted).reindex(result.dates)
        results[name] = {
            "held": [day_names if isinstance(day_names, list) else [] for day_names in names],
            "first": float(result.report["return"].iloc[0]),
        }
    return results


def faults(python: str) -> list[Fault]:
    """Check for each fault whether Qlib has it and qtorch avoids it."""
    with tempfile.TemporaryDirectory() as folder:
        provider = str(write_qlib(market(), Path(folder) / "market"))
        qlib_results, results = ask_qlib(python, provider), run_qtorch(provider)
        runs = {str(ask_qlib(python, provider, k)["held without scores"]) for k in range(6)}

    def days(case: str, case_results: dict[str, Any]) -> list[str]:
        return ["".join(names) for names in case_results[case]["held"]]

    fault_list = []
    for name, expected in (
        ("n_drop of 0", ["AB", "AB"]),
        ("too full", ["BCDE", "CDE"]),
        ("only_tradable without room", ["AB", "AB"]),
    ):
        qtorch_days, qlib_days = days(name, results), days(name, qlib_results)
        fault_list.append(
            Fault(
                name,
                f"holds {qlib_days}",
                f"holds {qtorch_days}",
                qlib_days != expected,
                qtorch_days == expected,
            )
        )
    qtorch_days = days("held without scores", results)
    fault_list.append(
        Fault(
            "held without scores",
            f"{len(runs)} different backtests in 6 runs",
            f"holds {qtorch_days}",
            len(runs) > 1,
            qtorch_days == ["ABC", "ABI"],
        )
    )
    first_returns = qlib_results["too full"]["first"], results["too full"]["first"]
    fault_list.append(
        Fault(
            "an initial portfolio",
            f"first return {first_returns[0]:.3g}",
            f"first return {first_returns[1]:.3g}",
            first_returns[0] > 1,
            abs(first_returns[1]) < 1e-9,
        )
    )
    return fault_list


if __name__ == "__main__":
    for fault in faults(sys.argv[1]):
        print(fault, "\n   ", "in Qlib" if fault.shows_in_qlib else "NOT IN QLIB", fault.is_avoided)
