"""Faults of Qlib's TopkDropoutStrategy and Account that qtorch does not repeat, worked by hand.

    python scripts/parity/backtest_faults.py PYTHON_WITH_PYQLIB

All prices are 10 throughout, so that what is held says it all.

- `n_drop=0`: `list(comb)[-0:]` is the whole list, so everything that is held is sold.
- Too full: with more held than topk + n_drop the number of candidates is negative, and
  `list[:-2]` takes all but two of the market's for candidates, in places that do not exist.
- `only_tradable`: where the number of candidates is 0, its loop takes one before it looks.
- Held instruments without a score go first; with no candidates beside them their order is that
  of a set of strings, so that runs of the same backtest sell different ones (PYTHONHASHSEED).
- An initial portfolio: the first day's return takes its whole value for a profit.
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
    """Nine instruments at 10."""
    index = pd.MultiIndex.from_product([DAYS, list(NAMES)], names=["datetime", "instrument"])
    bars = {"open": 10.0, "close": 10.0, "volume": 1e6, "factor": 1.0, "change": 0.0}
    return FrameSource(pd.DataFrame(bars, index=index))


def scores(order: str) -> list[tuple[str, str, float]]:
    """Scores of the first two days, the best first; what is not named has none."""
    return [(f"{d:%Y-%m-%d}", n, -float(k)) for d in DAYS[:2] for k, n in enumerate(order)]


def held(names: str) -> dict[str, Any]:
    """An account of a hundred of each and no cash."""
    return {"cash": 1.0, **{n: {"amount": 100, "price": 10.0} for n in names}}


CASES: dict[str, dict[str, Any]] = {
    "n_drop of 0": {
        "scores": scores("ABCDEFGHI"),
        "account": {"cash": 1000.0},
        "strategy": {"topk": 2, "n_drop": 0},
    },
    "too full": {
        "scores": scores("IHGFEDCBA"),
        "account": held("ABCDE"),
        "strategy": {"topk": 2, "n_drop": 1, "hold_thresh": 0},
    },
    "only_tradable without room": {
        "scores": scores("ABCDEFGHI"),
        "account": held("ABC"),
        "strategy": {"topk": 2, "n_drop": 1, "hold_thresh": 0, "only_tradable": True},
    },
    "held without scores": {
        "scores": scores("IHG"),
        "account": held("ABCD"),
        "strategy": {"topk": 3, "n_drop": 1, "hold_thresh": 0},
    },
}


def jobs(provider: str) -> list[dict[str, Any]]:
    """The cases for Qlib's side."""
    return [{"provider": provider, "start": START, "end": END, **case} for case in CASES.values()]


def ask_qlib(python: str, provider: str, hash_seed: int = 0) -> dict[str, dict[str, Any]]:
    """What real Qlib does, by case."""
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder, "job.json")
        job.write_text(json.dumps(jobs(provider)))
        script = Path(__file__).with_name("qlib_backtest_faults.py")
        done = subprocess.run(
            [python, str(script), str(job)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONHASHSEED": str(hash_seed)},
        )
    if done.returncode:
        raise RuntimeError(f"Qlib's side failed:\n{done.stderr[-3000:]}")
    return dict(zip(CASES, json.loads(done.stdout.splitlines()[-1]), strict=True))


def ours(provider: str) -> dict[str, dict[str, Any]]:
    """The same of qtorch."""
    found = {}
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
        found[name] = {
            "held": [x if isinstance(x, list) else [] for x in names],
            "first": float(result.report["return"].iloc[0]),
        }
    return found


def faults(python: str) -> list[Fault]:
    """Each fault: whether Qlib shows it and qtorch does not."""
    with tempfile.TemporaryDirectory() as folder:
        provider = str(write_qlib(market(), Path(folder) / "market"))
        theirs, mine = ask_qlib(python, provider), ours(provider)
        runs = {str(ask_qlib(python, provider, k)["held without scores"]) for k in range(6)}

    def days(case: str, of: dict[str, Any]) -> list[str]:
        return ["".join(names) for names in of[case]["held"]]

    told = []
    for name, right in (
        ("n_drop of 0", ["AB", "AB"]),
        ("too full", ["BCDE", "CDE"]),
        ("only_tradable without room", ["AB", "AB"]),
    ):
        own, qlib = days(name, mine), days(name, theirs)
        told.append(Fault(name, f"holds {qlib}", f"holds {own}", qlib != right, own == right))
    own = days("held without scores", mine)
    told.append(
        Fault(
            "held without scores",
            f"{len(runs)} different backtests in 6 runs",
            f"holds {own}",
            len(runs) > 1,
            own == ["ABC", "ABI"],
        )
    )
    first = theirs["too full"]["first"], mine["too full"]["first"]
    told.append(
        Fault(
            "an initial portfolio",
            f"first return {first[0]:.3g}",
            f"first return {first[1]:.3g}",
            first[0] > 1,
            abs(first[1]) < 1e-9,
        )
    )
    return told


if __name__ == "__main__":
    for fault in faults(sys.argv[1]):
        print(fault, "\n   ", "shows" if fault.shows else "DOES NOT SHOW", fault.avoided)
