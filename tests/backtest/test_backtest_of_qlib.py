"""Compare backtests with the stored results of Qlib on the same bars and scores."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "parity"))

import backtests as parity  # noqa: E402
from backtest_cases import cases, exchange_kwargs, scores, strategy_kwargs  # noqa: E402
from backtest_goldens import (  # noqa: E402
    BENCHMARK,
    FIELDS,
    SPAN,
    golden_cases,
    golden_market,
    golden_scores,
)

from qtorch.backtest import SoftTopkStrategy, TopkDropoutStrategy, backtest  # noqa: E402
from qtorch.data import QlibSource  # noqa: E402
from qtorch.data.source import write_qlib  # noqa: E402

GOLDEN = ROOT / "tests" / "golden" / "qlib_backtests.npz"
CASES = golden_cases()


@pytest.fixture(scope="module")
def market():
    return golden_market()


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDEN))


@pytest.mark.parametrize("number", range(len(CASES)))
def test_daily_report_positions_and_costs_equal_qlib(number, market, golden):
    case = CASES[number]
    result = backtest(
        *SPAN,
        TopkDropoutStrategy(signal=golden_scores(market), **strategy_kwargs(case)),
        account=parity.CASH,
        benchmark=BENCHMARK,
        exchange_kwargs=exchange_kwargs(case),
        source=market,
        as_qlib=True,
    )
    result.check()
    names, days = sorted(market.instruments("all")), market.calendar(*SPAN)
    report = golden[f"{number}/report"]
    np.testing.assert_allclose(result.report[list(FIELDS)], report, rtol=1e-9, atol=1e-9)

    positions = result.positions
    day, instrument = golden[f"{number}/held"]
    qlib_positions = {
        (days[d], names[i]): (amount, count)
        for d, i, amount, count in zip(
            day, instrument, golden[f"{number}/amount"], golden[f"{number}/count"], strict=True
        )
    }
    assert set(positions.index) == set(qlib_positions)
    expected = np.array([qlib_positions[key] for key in positions.index])
    np.testing.assert_allclose(positions[["amount", "count"]], expected, rtol=1e-9)

    day, instrument = golden[f"{number}/asked"]
    qlib_orders = {
        (days[d], names[i]): (abs(amount), cost)
        for d, i, amount, cost in zip(
            day, instrument, golden[f"{number}/dealt"], golden[f"{number}/cost"], strict=True
        )
    }
    orders = result.orders
    assert set(orders.index) == set(qlib_orders)
    expected = np.array([qlib_orders[key] for key in orders.index])
    np.testing.assert_allclose(orders[["deal_amount", "cost"]], expected, rtol=1e-9, atol=1e-6)


def test_golden_cases_cover_rejections_and_overfull_portfolios(golden):
    num_rejected = sum((golden[f"{k}/dealt"] == 0).sum() for k in range(len(CASES)))
    assert num_rejected > 5
    max_held = [np.bincount(golden[f"{k}/held"][0]).max() for k in range(len(CASES))]
    assert any(count > case["topk"] for count, case in zip(max_held, CASES, strict=True))
    final_accounts = {round(float(golden[f"{k}/report"][-1, 0]), 2) for k in range(len(CASES))}
    assert len(final_accounts) == len(CASES)


@pytest.mark.qlib
@pytest.mark.slow
def test_real_bars_equal_qlib(market_data, qlib_python, tmp_path):
    from qtorch.data import QlibSource

    provider = str(market_data / "qlib_nyse500")
    source = QlibSource(provider)
    random_scores = scores(
        source.calendar("2015-12-25", "2016-07-10"), sorted(source.instruments("nyse500"))
    )
    span, selected_cases = ("2016-01-01", "2016-06-30"), cases()[:4]
    qlib_results = parity.ask_qlib(
        qlib_python,
        provider,
        random_scores,
        span,
        selected_cases,
        tmp_path,
        benchmark="NYSE500EW",
        # Without the repair, which stocks Qlib sells depends on the hashes of strings: the results
        # of the second case differ between runs.
        repair_faults=True,
    )
    for case, qlib_result in zip(selected_cases, qlib_results, strict=True):
        result = parity.run_qtorch(provider, random_scores, span, case, benchmark="NYSE500EW")
        row = parity.compare(str(case), result, qlib_result)
        assert row.passes, row


SOFT_TOPK = [
    {"topk": 5, "max_sold_weight": 0.1, "buy_method": "first_fill", "risk_degree": 0.95},
    {"topk": 8, "max_sold_weight": 1.0, "buy_method": "first_fill", "risk_degree": 0.8},
    {"topk": 5, "max_sold_weight": 0.05, "buy_method": "average_fill", "risk_degree": 0.95},
]


@pytest.mark.qlib
def test_soft_topk_equals_qlib(qlib_python, market, tmp_path):
    """With price limits and trade units; Qlib cannot value a holding that is suspended."""
    bars = market.load().to_frame()["close"].unstack().loc[slice(*SPAN)]
    traded = bars.columns[bars.notna().all()].drop(BENCHMARK)
    signal = golden_scores(market)
    signal = signal[signal.index.get_level_values("instrument").isin(traded)]
    exchange = {"limit_threshold": 0.03, "deal_price": "open", "trade_unit": 100,
                "open_cost": 0.0005, "close_cost": 0.0015, "min_cost": 5.0}  # fmt: skip
    selected_cases = [{"strategy": arguments, "exchange": exchange} for arguments in SOFT_TOPK]
    provider = str(write_qlib(market, tmp_path / "market"))
    qlib_results = parity.ask_qlib(
        qlib_python, provider, signal, SPAN, selected_cases, tmp_path,
        benchmark=BENCHMARK, script="qlib_soft_topk.py",
    )  # fmt: skip
    for case, qlib_result in zip(selected_cases, qlib_results, strict=True):
        result = backtest(
            *SPAN,
            SoftTopkStrategy(signal=signal, **case["strategy"]),
            account=parity.CASH,
            benchmark=BENCHMARK,
            exchange_kwargs=exchange,
            source=QlibSource(provider),
            as_qlib=True,
        )
        row = parity.compare(str(case), result, qlib_result)
        assert row.passes, row
        assert len(qlib_result.orders) > 300
