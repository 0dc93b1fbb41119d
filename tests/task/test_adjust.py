"""TimeAdjuster on a calendar that is small enough to count days by hand."""

from __future__ import annotations

import pandas as pd
import pytest

from qtorch.core.errors import ConfigError, DataError
from qtorch.data.source.synthetic import SyntheticSource
from qtorch.task import TimeAdjuster

# Ten days: Mon 1 Jan 2018 .. Fri 12 Jan 2018.
DAYS = pd.bdate_range("2018-01-01", periods=10)


@pytest.fixture
def adjuster():
    return TimeAdjuster(calendar=DAYS)


def day(number: int) -> pd.Timestamp:
    return DAYS[number]


def test_dates_are_aligned_to_trading_days_inside_the_segment(adjuster):
    saturday = "2018-01-06"
    assert adjuster.align_time(saturday, "start") == day(5)
    assert adjuster.align_time(saturday, "end") == day(4)
    assert adjuster.align_seg({"a": ("2018-01-06", "2018-01-07")})["a"] == (day(5), day(4))
    assert adjuster.align_seg(["2018-01-01", None]) == (day(0), None)
    assert adjuster.max() == day(9)


@pytest.mark.parametrize(("date", "kind"), [("2017-12-01", "end"), ("2018-02-01", "start")])
def test_date_outside_the_calendar_raises_an_error(adjuster, date, kind):
    with pytest.raises(DataError, match=r"which covers 2018-01-01\.\.2018-01-12"):
        adjuster.align_time(date, kind)


def test_get_returns_none_after_the_end_and_raises_before_the_start(adjuster):
    assert adjuster.get(9) == day(9)
    assert adjuster.get(10) is None
    assert adjuster.get(None) is None
    with pytest.raises(DataError, match="2 trading days before"):
        adjuster.get(-2)


def test_cal_interval_counts_trading_days(adjuster):
    assert adjuster.cal_interval("2018-01-09", "2018-01-05") == 2
    assert adjuster.cal_interval("2018-01-05", "2018-01-09") == -2


def test_truncate_counts_days_before_the_test(adjuster):
    # The test starts on day 7; two days earlier is day 5.
    assert adjuster.truncate((day(1), day(6)), day(7), 2) == (day(1), day(5))
    assert adjuster.truncate((day(1), day(3)), day(7), 2) == (day(1), day(3))
    assert adjuster.truncate((None, None), day(7), 2) == (None, day(5))
    with pytest.raises(ConfigError, match="no day left when it is truncated 3 trading days"):
        adjuster.truncate((day(5), day(6)), day(7), 3)


def test_shift_moves_both_dates_or_only_the_end(adjuster):
    assert adjuster.shift((day(1), day(3)), 4) == (day(5), day(7))
    assert adjuster.shift([day(1), day(3)], 4, TimeAdjuster.SHIFT_EX) == (day(1), day(7))
    assert adjuster.shift((day(1), day(6)), 4) == (day(5), None)
    with pytest.raises(KeyError, match="starts after the calendar's end") as error:
        adjuster.shift((day(8), day(9)), 2)
    assert isinstance(error.value, DataError)


def test_set_end_time_truncates_and_restores_the_calendar(adjuster):
    adjuster.set_end_time("2018-01-06")
    assert len(adjuster.cals) == 5
    adjuster.set_end_time()
    assert len(adjuster.cals) == 10
    with pytest.raises(DataError, match="no trading day up to"):
        adjuster.set_end_time("2017-01-01")


def test_bare_end_date_includes_intraday_bars():
    stamps = [d + pd.Timedelta(hours=h) for d in DAYS[:3] for h in (10, 11, 14)]
    adjuster = TimeAdjuster(calendar=stamps)
    assert adjuster.align_time("2018-01-02", "end") == stamps[5]
    assert adjuster.align_time("2018-01-02 11:00", "end") == stamps[4]


def test_calendar_of_a_source_or_of_the_session(tmp_path, monkeypatch):
    import qtorch
    from qtorch.data.source.writer import write_qlib

    source = SyntheticSource(5, "2018-01-01", "2018-03-30", seed=0)
    assert TimeAdjuster(source=source).max() == source.calendar()[-1]
    folder = write_qlib(source, tmp_path / "market")
    qtorch.init(provider_uri=str(folder))
    adjuster = TimeAdjuster()
    assert adjuster.max() == source.calendar()[-1]
    dates = [*(f"{d:%Y-%m-%d}" for d in adjuster.cals), "2018-04-02"]
    (folder / "calendars" / "day_future.txt").write_text("\n".join(dates))
    assert TimeAdjuster().max() == pd.Timestamp("2018-04-02")
    assert TimeAdjuster(future=False).max() == adjuster.max()


def test_missing_calendar_raises_an_error():
    with pytest.raises(ConfigError, match="no data source"):
        TimeAdjuster()


@pytest.mark.parametrize("invalid", [0.7, True, "soon", pd.Timestamp("2018-01-01", tz="UTC")])
def test_invalid_date_is_rejected(adjuster, invalid):
    with pytest.raises(DataError, match="date"):
        adjuster.align_idx(invalid)
    with pytest.raises(ConfigError, match="two dates"):
        adjuster.align_seg(invalid)
