"""qtorch's backtests, for the bench: one pass as Qlib makes it, and many score columns at once.

    python backtest_side.py backtest --provider FOLDER --work DIR

Prints one line of JSON. Qlib's pass is `backtest` of qlib_side.py, on the same scores.
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
from memory import Peak
from qlib_side import BACKTEST, random_scores

from qtorch.backtest import Exchange, TopkDropoutStrategy, backtest
from qtorch.data import QlibSource

COLUMNS = 64


def run(scores: Any, source: QlibSource, exchange: Exchange | None = None) -> tuple[float, Any]:
    """Seconds of a backtest to its report, and the result."""
    costs = {k: BACKTEST[k] for k in ("open_cost", "close_cost", "min_cost", "limit_threshold")}
    begin = time.perf_counter()
    found = backtest(
        *BACKTEST["span"],
        TopkDropoutStrategy(signal=scores, topk=50, n_drop=5),
        account=BACKTEST["account"],
        benchmark=BACKTEST["benchmark"],
        exchange_kwargs={"exchange": exchange or Exchange(source=source, **costs)},
    )
    for member in found:
        member.report  # noqa: B018 - what a caller waits for
    return time.perf_counter() - begin, found


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
    run(scores.iloc[:5000], source)  # imports
    peak = Peak()
    one = sorted(run(scores, source)[0] for _ in range(3))[1]
    one_mib = peak.mib
    random = np.random.default_rng(1)
    noise = {f"s{k}": scores + random.standard_normal(len(scores)) for k in range(COLUMNS)}
    frame = pd.DataFrame(noise)
    costs = {k: BACKTEST[k] for k in ("open_cost", "close_cost", "min_cost", "limit_threshold")}
    exchange = Exchange(source=source, **costs)
    run(scores, source, exchange)  # its bars are in memory for both sides
    singles = sum(run(frame[name], source, exchange)[0] for name in frame)
    peak = Peak()
    many, whole = run(frame, source, exchange)
    mib = peak.mib
    alone = run(frame["s7"], source, exchange)[1]
    assert whole["s7"].report.equals(alone.report)
    print(
        json.dumps(
            {"one": one, "one_mib": one_mib, "singles": singles, "many": many, "many_mib": mib}
        )
    )


if __name__ == "__main__":
    main()
