"""Benchmark qtorch's backtests: one pass as in Qlib, and many score columns in one pass.

    python backtest_side.py backtest --provider FOLDER --work DIR

Prints one line of JSON. qlib_side.py runs Qlib's backtest on the same scores.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent))
from memory import PeakMemory
from qlib_side import BACKTEST, random_scores

from qtorch.backtest import Exchange, TopkDropoutStrategy, backtest
from qtorch.data import QlibSource

COLUMNS = 64


def run_backtest(
    scores: Any, source: QlibSource, exchange: Exchange | None = None
) -> tuple[float, Any]:
    """Run a backtest; return its seconds including the reports, and the result."""
    costs = {k: BACKTEST[k] for k in ("open_cost", "close_cost", "min_cost", "limit_threshold")}
    begin = time.perf_counter()
    result = backtest(
        *BACKTEST["span"],
        TopkDropoutStrategy(signal=scores, topk=50, n_drop=5),
        account=BACKTEST["account"],
        benchmark=BACKTEST["benchmark"],
        exchange_kwargs={"exchange": exchange or Exchange(source=source, **costs)},
    )
    for member in result:
        member.report  # noqa: B018 - the report is computed on first access
    return time.perf_counter() - begin, result


def measure_audit(result: Any) -> float:
    """The seconds of `result.check()` on a result whose orders were not read before."""
    begin = time.perf_counter()
    result.check()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--provider", required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", required=True)
    args = parser.parse_args()
    source = QlibSource(args.provider)
    calendar = source.calendar(*BACKTEST["scores"])
    scores = random_scores(calendar, sorted(source.instruments("nyse500")))
    run_backtest(scores.iloc[:5000], source)  # warm-up: imports
    peak = PeakMemory()
    single_seconds = sorted(run_backtest(scores, source)[0] for _ in range(3))[1]
    single_mib = peak.mib
    audit_seconds = measure_audit(run_backtest(scores, source)[1])
    random = np.random.default_rng(1)
    noise = {f"s{k}": scores + random.standard_normal(len(scores)) for k in range(COLUMNS)}
    frame = pd.DataFrame(noise)
    costs = {k: BACKTEST[k] for k in ("open_cost", "close_cost", "min_cost", "limit_threshold")}
    exchange = Exchange(source=source, **costs)
    run_backtest(scores, source, exchange)  # warm-up: loads the bars, which both sides then share
    separate_seconds = sum(run_backtest(frame[name], source, exchange)[0] for name in frame)
    peak = PeakMemory()
    batch_seconds, batch_result = run_backtest(frame, source, exchange)
    mib = peak.mib
    separate_result = run_backtest(frame["s7"], source, exchange)[1]
    assert batch_result["s7"].report.equals(separate_result.report)
    print(
        json.dumps(
            {
                "one": single_seconds,
                "one_mib": single_mib,
                "audit": audit_seconds,
                "singles": separate_seconds,
                "many": batch_seconds,
                "many_mib": mib,
            }
        )
    )


if __name__ == "__main__":
    main()
