"""What `describe` finds in a table whose faults are known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from qtorch.data.describe import Description, describe
from qtorch.data.source.synthetic import SyntheticSource

DAYS = pd.bdate_range("2020-01-01", periods=40)


def faulty_frame() -> pd.DataFrame:
    """Five instruments over forty days, each with a fault of its own."""
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
    gone = [(d, "A") for d in DAYS[15:18]] + [(d, "C") for d in DAYS[:3]]
    return frame.drop(index=[*gone, (DAYS[39], "B")])


@pytest.fixture(scope="module")
def found() -> Description:
    return describe(faulty_frame())


def test_counts(found):
    assert found.num_rows == 5 * 40 - 3 - 1
    assert (found.late, found.gone) == (1, 1)
    assert found.bars.shape == (40, 5)
    assert found.universes == {"all": 5}
    assert found.missing["close"] == pytest.approx(3 / 196)
    assert found.missing["open"] == pytest.approx((3 + 5) / 196)


def test_holes(found):
    gap = found.suspensions.iloc[0]
    assert (gap["instrument"], gap["start"], gap["days"]) == ("A", DAYS[15], 3)
    assert len(found.suspensions) == 1
    broken = found.broken_days.iloc[0]
    assert (broken["datetime"], broken["field"], broken["missing"]) == (DAYS[30], "open", 1.0)
    assert len(found.broken_days) == 1


def test_suspicious_values(found):
    assert found.moves["instrument"].tolist() == ["B"]
    assert found.moves["datetime"].tolist() == [DAYS[20]]
    assert found.moves["move"].iloc[0] == pytest.approx(0.8, abs=0.08)
    assert found.zeros == {"volume": 1}
    assert found.negative == {"low": 1, "volume": 1}
    assert found.infinite == {"low": 1}
    assert found.out_of_range == 1
    run = found.stale.iloc[0]
    assert (run["instrument"], run["days"], run["end"]) == ("C", 15, DAYS[24])
    assert found.twins == [("D", "E")]


def test_pauses_of_the_calendar():
    days = DAYS[:20].append(DAYS[35:])
    frame = faulty_frame()
    pauses = describe(frame[frame.index.get_level_values(0).isin(days)]).pauses
    assert pauses["after"].tolist() == [DAYS[19]]
    assert pauses["days"].tolist() == [(DAYS[35] - DAYS[19]).days]


def test_text_names_what_was_found(found):
    text = found.text()
    for part in (
        "5 instruments, 40 dates 2020-01-01 .. 2020-02-25 (day), 196 rows",
        "1 listed later than the first date, 1 gone before the last",
        "the longest 3 (A from 2020-01-22)",
        "2020-02-12 open 100.0%",
        "1 beyond 50%: B 2020-01-29 +",
        "zeros       volume 1",
        "D = E",
        "C 15 until 2020-02-04",
    ):
        assert part in text
    assert max(map(len, text.splitlines())) < 200


def test_a_clean_market_takes_few_lines():
    source = SyntheticSource(20, "2019-01-01", "2020-12-31")
    found = describe(source, universe="stocks")
    text = found.text()
    for fault in ("large moves", "zeros", "negative", "twins", "bars  ", "calendar", "stale"):
        assert fault not in text, text
    mean = source.load(["change"], instruments="stocks").column("change").nanmean(1)[1:]
    expected = np.cumprod(1 + mean.double().numpy())
    np.testing.assert_allclose(found.index.to_numpy()[1:], expected, rtol=1e-4)


def test_dates_and_universe_select():
    source = SyntheticSource(20, "2019-01-01", "2020-12-31")
    found = describe(source, universe="liquid", start_time="2020-01-01", end_time="2020-06-30")
    assert found.calendar[0] == pd.Timestamp("2020-01-01")
    assert found.num_rows == int((found.bars > 0).sum())
    assert (found.bars > 0).sum(1).max() <= 13


def test_picture_is_written(found, tmp_path):
    found.picture().savefig(tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "bars.png").stat().st_size > 10_000


def test_one_instrument_and_a_frame_without_close():
    index = pd.MultiIndex.from_product([DAYS, ["A"]], names=["datetime", "instrument"])
    found = describe(pd.DataFrame({"signal": np.linspace(1, 2, 40)}, index))
    assert found.num_rows == 40
    found.picture()
