"""IC decay, score autocorrelation and quantile returns, checked by hand and against scipy."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from qtorch.core.errors import ArgumentError
from qtorch.metrics import calc_ic, ic_decay, quantile_returns, score_autocorrelation
from qtorch.metrics.signal import shift_days

DAYS = pd.bdate_range("2020-01-01", periods=12)
NAMES = [f"I{k}" for k in range(9)]
INDEX = pd.MultiIndex.from_product([DAYS, NAMES], names=["datetime", "instrument"])


@pytest.fixture(scope="module")
def panel():
    """Scores and labels in shuffled rows, with some labels missing."""
    rng = np.random.default_rng(3)
    frame = pd.DataFrame(rng.normal(size=(len(INDEX), 2)), INDEX, ["score", "label"])
    frame = frame.sample(frac=1.0, random_state=0)
    frame.loc[rng.random(len(INDEX)) < 0.1, "label"] = np.nan
    return frame


def test_shift_days_counts_trading_days_not_rows():
    values = pd.Series(range(len(INDEX)), INDEX).drop(index=(DAYS[1], "I0"))
    shifted_values = shift_days(values, 1)
    assert (DAYS[0], "I0") not in shifted_values.index  # it has no value on the next day
    assert shifted_values.loc[(DAYS[0], "I1")] == values.loc[(DAYS[1], "I1")]
    assert shifted_values.loc[(DAYS[1], "I0")] == values.loc[(DAYS[2], "I0")]
    assert shifted_values.index.get_level_values(0).max() == DAYS[-2]
    back = shift_days(values, -2)
    assert back.loc[(DAYS[2], "I3")] == values.loc[(DAYS[0], "I3")]


def test_ic_decay_equals_correlation_with_later_labels(panel):
    result = ic_decay(panel["score"], panel["label"], horizons=(1, 3))
    score, label = (panel[c].unstack() for c in ("score", "label"))
    for horizon in (1, 3):
        pairs = [
            (score.loc[day], label.loc[later_day])
            for day, later_day in zip(DAYS, DAYS[horizon - 1 :], strict=False)
        ]
        pairs = [(s[y.notna()], y.dropna()) for s, y in pairs]
        daily = np.array([stats.pearsonr(s, y)[0] for s, y in pairs])
        ranks = np.array([stats.spearmanr(s, y)[0] for s, y in pairs])
        row = result.loc[horizon]
        assert row["days"] == len(daily) == 13 - horizon
        assert row["ic"] == pytest.approx(daily.mean())
        assert row["ic_error"] == pytest.approx(stats.sem(daily))
        assert row["rank_ic"] == pytest.approx(ranks.mean())
        assert row["rank_ic_error"] == pytest.approx(stats.sem(ranks))
    assert result.loc[1, "ic"] == pytest.approx(calc_ic(panel["score"], panel["label"])[0].mean())


def test_one_day_signal_decays_to_zero():
    rng = np.random.default_rng(5)
    days = pd.bdate_range("2015-01-01", periods=300)
    index = pd.MultiIndex.from_product([days, NAMES], names=["datetime", "instrument"])
    label = pd.Series(rng.normal(size=len(index)), index)
    result = ic_decay(label + rng.normal(size=len(index)), label, horizons=(1, 2, 10))
    assert result["ic"].iloc[0] > 0.6
    assert (result["ic"].iloc[1:].abs() < 4 * result["ic_error"].iloc[1:]).all()


def test_score_autocorrelation_equals_scipy(panel):
    result = score_autocorrelation(panel["score"], lag=2)
    table = panel["score"].unstack()
    expected = [stats.spearmanr(table.loc[a], table.loc[b])[0] for a, b in zip(DAYS, DAYS[2:])]  # noqa: B905
    assert list(result.index) == list(DAYS[2:])
    np.testing.assert_allclose(result, expected)
    same = pd.Series(panel.index.get_level_values(1).str[1:].astype(float), panel.index)
    np.testing.assert_allclose(score_autocorrelation(same), 1.0)


def test_quantile_returns_by_hand():
    day = [(DAYS[0], n) for n in NAMES[:7]]
    index = pd.MultiIndex.from_tuples([*day, (DAYS[1], "I0")], names=["datetime", "instrument"])
    score = pd.Series([3, 1, 2, 5, 4, 6, np.nan, 1.0], index)
    label = pd.Series([0.3, 0.1, 0.2, np.nan, 0.4, 0.6, 9.0, 1.0], index)
    result = quantile_returns(score, label, 2)
    # The labels in the order of the scores: 0.1 0.2 0.3 | 0.4 0.6.
    np.testing.assert_allclose(result.loc[DAYS[0]], [0.2, 0.5])
    assert result.loc[DAYS[1]].isna().all()
    assert list(result.columns) == [1, 2]


def test_quantiles_have_nearly_equal_sizes():
    score = pd.Series(np.arange(len(INDEX), dtype=float), INDEX)
    means = quantile_returns(score, score, 4).iloc[0]
    parts = np.array_split(np.arange(9), 4)
    np.testing.assert_allclose(means, [np.mean(p) for p in parts])


def test_invalid_arguments_are_rejected(panel):
    with pytest.raises(ArgumentError, match="horizons"):
        ic_decay(panel["score"], panel["label"], horizons=(0, 1))
    with pytest.raises(ArgumentError, match="lag=0"):
        score_autocorrelation(panel["score"], lag=0)
    with pytest.raises(ArgumentError, match="num_quantiles=1"):
        quantile_returns(panel["score"], panel["label"], 1)
