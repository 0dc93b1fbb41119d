"""Run Qlib's SoftTopkStrategy on a list of settings; needs a Python with pyqlib.

    python qlib_soft_topk.py JOB.json OUT

JOB and OUT are those of qlib_backtest.py; a case has the arguments of the strategy, and the
exchange's. The strategy cannot be built, because it hands its arguments to a base class that takes
them by name only; this is repaired, and the best instruments are a list in the order of their
scores instead of a set.
"""

from __future__ import annotations

import inspect
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import pandas as pd
import qlib
from qlib_backtest import orders_frame, positions_frame

OLD_CODE = "buy_signal_stocks = set(score.sort_values(ascending=False).iloc[: self.topk].index)"
NEW_CODE = "buy_signal_stocks = list(score.sort_values(ascending=False).iloc[: self.topk].index)"


def repair_strategy() -> type:
    """Return Qlib's strategy with a constructor that works, in a fixed order."""
    from qlib.contrib.strategy import cost_control

    strategy = cost_control.SoftTopkStrategy
    source = textwrap.dedent(inspect.getsource(strategy.generate_target_weight_position))
    assert source.count(OLD_CODE) == 1, "Qlib's source has changed"
    names = dict(vars(cost_control))
    exec(source.replace(OLD_CODE, NEW_CODE), names)

    class RepairedStrategy(strategy):  # type: ignore[misc, valid-type]
        def __init__(self, topk: int, max_sold_weight: float, buy_method: str, **kwargs: Any):
            cost_control.WeightStrategyBase.__init__(
                self, order_generator_cls_or_obj=cost_control.OrderGenWInteract, **kwargs
            )
            self.topk, self.max_sold_weight = topk, max_sold_weight
            self.buy_method = buy_method

        generate_target_weight_position = names["generate_target_weight_position"]

    return RepairedStrategy


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    out = Path(sys.argv[2])
    qlib.init(provider_uri=job["provider"], region="us", logging_level=50)
    from qlib.backtest import backtest

    scores, strategy = pd.read_pickle(job["scores"]), repair_strategy()
    for number, case in enumerate(job["cases"]):
        portfolio, indicators = backtest(
            start_time=job["start"],
            end_time=job["end"],
            strategy=strategy(signal=scores, **case["strategy"]),
            executor={
                "class": "SimulatorExecutor",
                "module_path": "qlib.backtest.executor",
                "kwargs": {"time_per_step": "day", "generate_portfolio_metrics": True},
            },
            account=job["account"],
            benchmark=job["benchmark"],
            exchange_kwargs={"codes": job["codes"], **case["exchange"]},
        )
        report, positions = portfolio["1day"]
        frame, indicator = indicators["1day"]
        report.to_parquet(out / f"{number}.report.parquet")
        frame.astype(float).to_parquet(out / f"{number}.indicators.parquet")
        positions_frame(positions).to_parquet(out / f"{number}.positions.parquet")
        orders_frame(indicator).to_parquet(out / f"{number}.orders.parquet")


if __name__ == "__main__":
    main()
