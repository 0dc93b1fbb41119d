"""The chart of daily IC."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from qtorch.record.report.signal_charts import ic_chart


@pytest.mark.slow
@pytest.mark.parametrize("num_days", [0, 1, 3, 60, 800])
def test_chart_of_any_number_of_days(num_days, tmp_path):
    dates = pd.bdate_range("2020-01-01", periods=num_days)
    ic = pd.Series(np.random.default_rng(0).normal(0.02, 0.1, num_days), dates)
    if num_days > 3:
        ic.iloc[2] = np.nan
    figure = ic_chart(ic, ic * 0.9)
    figure.savefig(tmp_path / "x.png", dpi=40)
    assert (tmp_path / "x.png").stat().st_size > 2000


def test_legend_shows_the_means():
    dates = pd.bdate_range("2020-01-01", periods=50)
    ic = pd.Series(np.linspace(-0.1, 0.2, 50), dates)
    axes = ic_chart(ic, ic).axes
    assert all(a.get_ylabel() for a in axes)
    texts = [t.get_text() for a in axes for t in a.get_legend().get_texts()]
    assert "IC: mean 0.0500, std 0.0892" in texts
