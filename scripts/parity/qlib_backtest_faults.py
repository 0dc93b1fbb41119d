"""Run Qlib's backtest on hand-worked cases; needs a Python with pyqlib.

    python qlib_backtest_faults.py JOB.json

JOB: a list of cases (provider, start, end, scores as [[date, instrument, score], ...], account,
strategy). Prints the instruments held on each day and the first return of each case, as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas as pd
import qlib


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    qlib.init(provider_uri=cases[0]["provider"], region="us", logging_level=50)
    from qlib.backtest import backtest
    from qlib.contrib.strategy import TopkDropoutStrategy

    results = []
    for case in cases:
        rows = pd.DataFrame(case["scores"], columns=["datetime", "instrument", "score"])
        rows["datetime"] = pd.to_datetime(rows["datetime"])
        scores = rows.set_index(["datetime", "instrument"])["score"]
        portfolio, _ = backtest(
            start_time=case["start"],
            end_time=case["end"],
            strategy=TopkDropoutStrategy(signal=scores, **case["strategy"]),
            executor={
                "class": "SimulatorExecutor",
                "module_path": "qlib.backtest.executor",
                "kwargs": {"time_per_step": "day", "generate_portfolio_metrics": True},
            },
            account=case["account"],
            benchmark=pd.Series(0.0, index=pd.to_datetime([case["start"]])),
            exchange_kwargs={"trade_unit": None, "open_cost": 0, "close_cost": 0, "min_cost": 0},
        )
        report, positions = portfolio["1day"]
        holdings = [sorted(p.get_stock_list()) for p in positions.values()]
        results.append({"held": holdings, "first": float(report["return"].iloc[0])})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
