"""Run Qlib's backtest on a list of settings; needs a Python with pyqlib.

    python qlib_backtest.py JOB.json OUT

JOB: provider, scores (a pickle), start, end, account, benchmark, codes, cases, repair_faults. OUT
is a folder that gets one parquet file per case and kind: report, positions, orders, indicators.

`repair_faults` repairs the behaviour of Qlib's strategy when the portfolio is too full for new
candidates (see `backtest_faults.py`): a negative number of candidates slices Python lists from the
end, and the order in which holdings without a score are sold is that of a set of strings, which
differs between processes.
"""

from __future__ import annotations

import inspect
import json
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import pandas as pd
import qlib
from backtest_cases import exchange_kwargs, strategy_kwargs


def positions_frame(positions: dict[pd.Timestamp, Any]) -> pd.DataFrame:
    rows = [
        (day, name, holding["amount"], holding["price"], holding["count_day"], holding["weight"])
        for day, position in positions.items()
        for name, holding in position.position.items()
        if isinstance(holding, dict)
    ]
    columns = ["datetime", "instrument", "amount", "price", "count", "weight"]
    return pd.DataFrame(rows, columns=columns)


def orders_frame(indicator: Any) -> pd.DataFrame:
    rows = []
    for day, orders in indicator.order_indicator_his.items():
        parts = [
            orders.get_index_data(k) for k in ("amount", "deal_amount", "trade_cost")
        ]  # Qlib's to_series fails with current pandas
        names = list(parts[0].index)
        rows.extend(zip([day] * len(names), names, *(p.data for p in parts), strict=True))
    return pd.DataFrame(rows, columns=["datetime", "instrument", "amount", "deal_amount", "cost"])


REPAIRS = (
    ("return list(li)[:n]", "return list(li)[: max(n, 0)]"),
    (
        "for si in reversed(li) if reverse else li:",
        "for si in (reversed(li) if reverse else li) if n > 0 else []:",
    ),
    (
        "current_stock_list = current_temp.get_stock_list()\n    # last",
        "current_stock_list = sorted(current_temp.get_stock_list())\n    # last",
    ),
    (
        "buy = today[: len(sell) + self.topk - len(last)]",
        "buy = today[: max(len(sell) + self.topk - len(last), 0)]",
    ),
)


def repair_strategy(strategy: type) -> type:
    """Return Qlib's strategy with the REPAIRS applied to its source."""
    source = textwrap.dedent(inspect.getsource(strategy.generate_trade_decision))
    for old_code, new_code in REPAIRS:
        assert source.count(old_code) == 1, f"Qlib's source has changed: {old_code}"
        source = source.replace(old_code, new_code)
    names = dict(vars(inspect.getmodule(strategy)))
    exec(source, names)
    decide = {"generate_trade_decision": names["generate_trade_decision"]}
    return type("RepairedStrategy", (strategy,), decide)


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    out = Path(sys.argv[2])
    qlib.init(provider_uri=job["provider"], region="us", logging_level=50)
    from qlib.backtest import backtest
    from qlib.contrib.strategy import TopkDropoutStrategy

    scores = pd.read_pickle(job["scores"])
    strategy = repair_strategy(TopkDropoutStrategy) if job["repair_faults"] else TopkDropoutStrategy
    seconds = []
    for number, case in enumerate(job["cases"]):
        begin = time.perf_counter()
        portfolio, indicators = backtest(
            start_time=job["start"],
            end_time=job["end"],
            strategy=strategy(signal=scores, **strategy_kwargs(case)),
            executor={
                "class": "SimulatorExecutor",
                "module_path": "qlib.backtest.executor",
                "kwargs": {"time_per_step": "day", "generate_portfolio_metrics": True},
            },
            account=job["account"],
            benchmark=job["benchmark"],
            exchange_kwargs={"codes": job["codes"], **exchange_kwargs(case)},
        )
        seconds.append(time.perf_counter() - begin)
        report, positions = portfolio["1day"]
        frame, indicator = indicators["1day"]
        report.to_parquet(out / f"{number}.report.parquet")
        frame.astype(float).to_parquet(out / f"{number}.indicators.parquet")
        positions_frame(positions).to_parquet(out / f"{number}.positions.parquet")
        orders_frame(indicator).to_parquet(out / f"{number}.orders.parquet")
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
