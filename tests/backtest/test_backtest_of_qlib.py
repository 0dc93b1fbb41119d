"""Backtests against what real Qlib made of the same bars and scores."""

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

from qtorch.backtest import TopkDropoutStrategy, backtest  # noqa: E402

GOLDEN = ROOT / "tests" / "golden" / "qlib_backtests.npz"
CASES = golden_cases()


@pytest.fixture(scope="module")
def market():
    return golden_market()


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDEN))


@pytest.mark.parametrize("number", range(len(CASES)))
def test_every_day_position_and_cost_is_qlibs(number, market, golden):
    case = CASES[number]
    own = backtest(
        *SPAN,
        TopkDropoutStrategy(signal=golden_scores(market), **strategy_kwargs(case)),
        account=parity.CASH,
        benchmark=BENCHMARK,
        exchange_kwargs=exchange_kwargs(case),
        source=market,
    )
    names, days = sorted(market.instruments("all")), market.calendar(*SPAN)
    report = golden[f"{number}/report"]
    np.testing.assert_allclose(own.report[list(FIELDS)], report, rtol=1e-9, atol=1e-9)

    held = own.positions
    day, instrument = golden[f"{number}/held"]
    theirs = {
        (days[d], names[i]): (amount, count)
        for d, i, amount, count in zip(
            day, instrument, golden[f"{number}/amount"], golden[f"{number}/count"], strict=True
        )
    }
    assert set(held.index) == set(theirs)
    expected = np.array([theirs[at] for at in held.index])
    np.testing.assert_allclose(held[["amount", "count"]], expected, rtol=1e-9)

    day, instrument = golden[f"{number}/asked"]
    asked = {
        (days[d], names[i]): (abs(amount), cost)
        for d, i, amount, cost in zip(
            day, instrument, golden[f"{number}/dealt"], golden[f"{number}/cost"], strict=True
        )
    }
    orders = own.orders
    assert set(orders.index) == set(asked)
    expected = np.array([asked[at] for at in orders.index])
    np.testing.assert_allclose(orders[["deal_amount", "cost"]], expected, rtol=1e-9, atol=1e-6)


def test_the_goldens_show_what_they_compare(golden):
    refused = sum((golden[f"{k}/dealt"] == 0).sum() for k in range(len(CASES)))
    assert refused > 5
    held = [np.bincount(golden[f"{k}/held"][0]).max() for k in range(len(CASES))]
    assert any(most > case["topk"] for most, case in zip(held, CASES, strict=True))
    ends = {round(float(golden[f"{k}/report"][-1, 0]), 2) for k in range(len(CASES))}
    assert len(ends) == len(CASES)


@pytest.mark.qlib
@pytest.mark.slow
def test_real_bars_and_real_qlib(market_data, qlib_python, tmp_path):
    from qtorch.data import QlibSource

    provider = str(market_data / "qlib_nyse500")
    source = QlibSource(provider)
    found = scores(
        source.calendar("2015-12-25", "2016-07-10"), sorted(source.instruments("nyse500"))
    )
    span, some = ("2016-01-01", "2016-06-30"), cases()[:4]
    answers = parity.ask_qlib(
        qlib_python, provider, found, span, some, tmp_path, benchmark="NYSE500EW"
    )
    for case, answer in zip(some, answers, strict=True):
        own = parity.ours(provider, found, span, case, benchmark="NYSE500EW")
        row = parity.compare(str(case), own, answer)
        assert row.passes, row
