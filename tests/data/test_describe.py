"""Findings of `describe` for a table with known faults."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from qtorch.data.describe import Description, describe
from qtorch.data.source.synthetic import SyntheticSource

DAYS = pd.bdate_range("2020-01-01", periods=40)


def faulty_frame() -> pd.DataFrame:
    """Build five instruments over forty days, each with a fault of its own."""
    rng = np.random.default_rng(0)
    index = pd.MultiIndex.from_product([DAYS, list("ABCDE")], names=["datetime", "instrument"])
    close = 100 * np.exp(np.cumsum(rng.normal(0, 0.01, (40, 5)), axis=0))
    close[20:, 1] *= 1.8
    close[10:25, 2] = close[10, 2]
    close[:, 4] = close[:, 3]
    frame = pd.DataFrame({"close": close.reshape(-1)}, index)
    frame["open"], frame["high"], frame["low"] = frame["close"], frame["close"], frame["close"]
    frame["volume"] = 1000.0
    frame.loc[(DAYS[5], "A"), "high"] *= 0.9
    frame.loc[(DAYS[6], "A"), "volume"] = 0
    frame.loc[(DAYS[7], "A"), "volume"] = -1
    frame.loc[(DAYS[8], "A"), "low"] = -np.inf
    frame.loc[(DAYS[30], slice(None)), "open"] = np.nan
    delisted_rows = [(d, "A") for d in DAYS[15:18]] + [(d, "C") for d in DAYS[:3]]
    return frame.drop(index=[*delisted_rows, (DAYS[39], "B")])


@pytest.fixture(scope="module")
def description() -> Description:
    return describe(faulty_frame())


def test_counts(description):
    assert description.num_rows == 5 * 40 - 3 - 1
    assert (description.num_listed_late, description.num_delisted) == (1, 1)
    assert description.bars.shape == (40, 5)
    assert description.universes == {"all": 5}
    assert description.missing["close"] == pytest.approx(3 / 196)
    assert description.missing["open"] == pytest.approx((3 + 5) / 196)


def test_gaps(description):
    gap = description.suspensions.iloc[0]
    assert (gap["instrument"], gap["start"], gap["days"]) == ("A", DAYS[15], 3)
    assert len(description.suspensions) == 1
    broken_day = description.broken_days.iloc[0]
    assert (broken_day["datetime"], broken_day["field"], broken_day["missing"]) == (
        DAYS[30],
        "open",
        1.0,
    )
    assert len(description.broken_days) == 1


def test_suspicious_values(description):
    assert description.moves["instrument"].tolist() == ["B"]
    assert description.moves["datetime"].tolist() == [DAYS[20]]
    assert description.moves["move"].iloc[0] == pytest.approx(0.8, abs=0.08)
    assert description.zeros == {"volume": 1}
    assert description.negative == {"low": 1, "volume": 1}
    assert description.infinite == {"low": 1}
    assert description.out_of_range == 1
    run = description.stale.iloc[0]
    assert (run["instrument"], run["days"], run["end"]) == ("C", 15, DAYS[24])
    assert description.duplicate_pairs == [("D", "E")]


def test_calendar_gaps():
    days = DAYS[:20].append(DAYS[35:])
    frame = faulty_frame()
    calendar_gaps = describe(frame[frame.index.get_level_values(0).isin(days)]).calendar_gaps
    assert calendar_gaps["after"].tolist() == [DAYS[19]]
    assert calendar_gaps["days"].tolist() == [(DAYS[35] - DAYS[19]).days]


def test_text_lists_the_findings(description):
    text = description.text()
    for part in (
        "5 instruments, 40 dates 2020-01-01 .. 2020-02-25 (day), 196 rows",
        "1 listed after the first date, 1 delisted before the last",
        "the longest 3 (A from 2020-01-22)",
        "2020-02-12 open 100.0%",
        "1 beyond 50%: B 2020-01-29 +",
        "zeros       volume 1",
        "D = E",
        "C 15 until 2020-02-04",
    ):
        assert part in text
    assert max(map(len, text.splitlines())) < 200


def test_a_clean_market_has_no_findings():
    source = SyntheticSource(20, "2019-01-01", "2020-12-31")
    description = describe(source, universe="stocks")
    text = description.text()
    for finding in (
        "large moves",
        "zeros",
        "negative",
        "duplicates",
        "bars  ",
        "calendar",
        "stale",
    ):
        assert finding not in text, text
    mean = source.load(["change"], instruments="stocks").column("change").nanmean(1)[1:]
    expected_index = np.cumprod(1 + mean.double().numpy())
    np.testing.assert_allclose(description.index.to_numpy()[1:], expected_index, rtol=1e-4)


def test_dates_and_universe_restrict_the_report():
    source = SyntheticSource(20, "2019-01-01", "2020-12-31")
    description = describe(
        source, universe="liquid", start_time="2020-01-01", end_time="2020-06-30"
    )
    assert description.calendar[0] == pd.Timestamp("2020-01-01")
    assert description.num_rows == int((description.bars > 0).sum())
    assert (description.bars > 0).sum(1).max() <= 13


def test_plot_is_written_to_a_file(description, tmp_path):
    description.plot().savefig(tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "bars.png").stat().st_size > 10_000


def test_one_instrument_and_a_frame_without_close():
    index = pd.MultiIndex.from_product([DAYS, ["A"]], names=["datetime", "instrument"])
    description = describe(pd.DataFrame({"signal": np.linspace(1, 2, 40)}, index))
    assert description.num_rows == 40
    description.plot()
