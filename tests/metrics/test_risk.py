from __future__ import annotations

import json
import os
import subprocess

import numpy as np
import pandas as pd
import pytest

from qtorch.core.errors import ConfigError
from qtorch.core.session import session_context
from qtorch.metrics.portfolio import indicator_analysis
from qtorch.metrics.risk import drawdown, periods_per_year, risk_analysis

RETURNS = [-0.01, -0.02, 0.005, 0.03, -0.01, 0.0, -0.015, 0.02]


@pytest.mark.parametrize(
    ("freq", "expected"),
    [("day", 238), ("1day", 238), ("week", 50), ("month", 12), ("5min", 240 * 238 / 5), ("2w", 25)],
)
def test_periods_per_year_of_qlib_are_those_of_region_cn(freq: str, expected: float) -> None:
    assert periods_per_year(freq, region="cn") == expected


@pytest.mark.parametrize(
    ("region", "freq", "expected"),
    [("us", "day", 252), ("us", "30min", 13 * 252), ("us", "1h", 6.5 * 252), ("tw", "day", 238)],
)
def test_the_region_sets_the_periods_per_year(region: str, freq: str, expected: float) -> None:
    with session_context(region=region):
        assert periods_per_year(freq) == expected


def test_bars_of_a_day_are_counted_in_the_dates() -> None:
    days = pd.bdate_range("2024-01-02", periods=5)
    times = [pd.Timedelta(minutes=m) for m in (600, 630, 660, 690)]
    bars = pd.DatetimeIndex([d + t for d in days for t in times])[2:]  # the first day has two bars
    assert periods_per_year("30min", region="us", dates=bars) == 4 * 252
    r = pd.Series(0.001, bars)
    r.iloc[0] = 0.002
    risk = risk_analysis(r)["risk"]
    assert risk["annualized_return"] == pytest.approx(r.mean() * 4 * 252)
    assert periods_per_year(dates=bars[2:-3]) == 4 * 252  # half of a day at both ends
    assert periods_per_year(dates=days) == 252
    weeks = pd.date_range("2020-01-03", periods=20, freq="W-FRI")
    assert periods_per_year(dates=weeks) == 52


def test_sum_mode_by_hand() -> None:
    r = pd.Series([0.1, -0.2, 0.05])
    risk = risk_analysis(r)["risk"]
    std = np.std([0.1, -0.2, 0.05], ddof=1)
    assert risk["mean"] == pytest.approx(-0.05 / 3)
    assert risk["annualized_return"] == pytest.approx(-0.05 / 3 * 252)
    assert risk["information_ratio"] == pytest.approx(-0.05 / 3 / std * np.sqrt(252))
    assert risk["max_drawdown"] == pytest.approx(-0.2)


def test_product_mode_by_hand() -> None:
    risk = risk_analysis(pd.Series([0.1, -0.2, 0.05]), N=3, mode="product")["risk"]
    growth = 1.1 * 0.8 * 1.05
    assert risk["annualized_return"] == pytest.approx(growth - 1)
    assert risk["mean"] == pytest.approx(growth ** (1 / 3) - 1)
    assert risk["max_drawdown"] == pytest.approx(0.8 - 1)
    assert risk["std"] == pytest.approx(np.std(np.log([1.1, 0.8, 1.05]), ddof=1))


def test_a_loss_in_the_first_period_is_a_drawdown() -> None:
    r = pd.Series([-0.5, 0.1, 0.1])
    assert drawdown(r).tolist() == pytest.approx([-0.5, -0.4, -0.3])
    assert drawdown(r, "product").tolist() == pytest.approx([-0.5, -0.45, -0.395])
    for mode in ("sum", "product"):
        assert risk_analysis(r, mode=mode).loc["max_drawdown", "risk"] == pytest.approx(-0.5)
        # Qlib's curve begins after the loss.
        assert risk_analysis(r, mode=mode, as_qlib=True).loc["max_drawdown", "risk"] == 0


@pytest.mark.qlib
def test_risk_analysis_equals_qlib() -> None:
    script = f"""
import json, pandas as pd
from qlib.contrib.evaluate import risk_analysis
r = pd.Series({RETURNS})
print("RESULT" + json.dumps([
    risk_analysis(r, freq=f, mode=m)["risk"].to_dict()
    for f in ("day", "week", "month") for m in ("sum", "product")]))
"""
    process = subprocess.run(
        [os.environ["QTORCH_QLIB_PYTHON"], "-c", script],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    qlib_results = json.loads(process.stdout.split("RESULT")[1])
    with session_context(region="cn"):  # Qlib has 238 days in every region
        results = [
            risk_analysis(pd.Series(RETURNS), freq=f, mode=m, as_qlib=True)["risk"].to_dict()
            for f in ("day", "week", "month")
            for m in ("sum", "product")
        ]
    for actual, expected in zip(results, qlib_results, strict=True):
        assert actual == pytest.approx(expected, abs=1e-12)


def test_invalid_arguments_are_rejected() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'week'"):
        risk_analysis(pd.Series([0.1]), freq="weak")
    with pytest.raises(ConfigError, match="sum"):
        risk_analysis(pd.Series([0.1]), mode="prod")
    with pytest.raises(ConfigError, match="not both"):
        risk_analysis(pd.Series([0.1]), N=252, freq="day")


def test_indicator_weighting_methods():
    nan = float("nan")
    trades = pd.DataFrame(
        {
            "ffr": [0.5, nan, 1.0],
            "pa": [0.02, nan, -0.01],
            "pos": [1.0, nan, 0.25],
            "deal_amount": [10.0, 0.0, 30.0],
            "value": [-100.0, 0.0, 100.0],
            "count": [2.0, 0.0, 1.0],
        }
    )
    averages = indicator_analysis(trades)["value"]
    assert averages.to_dict() == pytest.approx({"ffr": 2 / 3, "pa": 0.01, "pos": 0.75})
    averages = indicator_analysis(trades, "amount_weighted")["value"]
    assert averages.to_dict() == pytest.approx({"ffr": 0.875, "pa": -0.0025, "pos": 0.75})
    averages = indicator_analysis(trades, "value_weighted")["value"]
    assert averages.to_dict() == pytest.approx({"ffr": 0.75, "pa": 0.005, "pos": 0.75})
    with pytest.raises(ConfigError, match="method of indicator_analysis"):
        indicator_analysis(trades, "median")
