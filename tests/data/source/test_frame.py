"""FrameSource: a DataFrame or a Panel as a source."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from qtorch.core.errors import ConfigError, DataError
from qtorch.data.source.frame import FrameSource, as_source


@pytest.fixture
def frame(long_frame):
    return long_frame.set_index(["datetime", "instrument"])


def test_a_frame_is_loaded_unchanged(frame):
    source = FrameSource(frame)
    assert source.fields() == ("open", "close", "volume")
    pd.testing.assert_frame_equal(
        source.load().to_frame().dropna(),
        frame.sort_index().astype(np.float32),
        check_index_type=False,
        check_column_type=False,
    )


def test_missing_rows_are_suspended_days(frame):
    days = frame.index.get_level_values(0).unique().sort_values()[100:103]
    missing_rows = [(d, "S02") for d in days]
    source = FrameSource(frame.drop(index=[g for g in missing_rows if g in frame.index]))
    panel = source.load(["close"], start_time=days[0], end_time=days[-1], instruments=["S02"])
    assert panel.column("close").isnan().all()
    assert panel.mask.all()


def test_instruments_are_sorted_and_dollar_signs_removed(frame):
    panel = FrameSource(frame).load().select(instruments=["S05", "S01", "S03"])
    source = FrameSource(panel)
    assert list(source.load().instruments) == ["S01", "S03", "S05"]
    expected = panel.select(instruments=["S03"]).column("close")
    close = source.load(["close"], instruments=["S03"]).column("close")
    torch.testing.assert_close(close, expected, equal_nan=True)
    assert FrameSource(frame.add_prefix("$")).fields() == ("open", "close", "volume")


def test_a_selection_equals_the_same_part_of_the_whole_panel(frame):
    source = FrameSource(frame)
    whole = source.load()
    part = source.load(["volume", "open"], instruments=["S04", "S01"], start_time="2019-01-01")
    expected = whole.select(
        fields=["volume", "open"], instruments=["S01", "S04"], start="2019-01-01"
    )
    torch.testing.assert_close(part.values, expected.values, equal_nan=True)
    assert torch.equal(part.spans, expected.spans)


def test_universes_by_list_and_by_spans(frame):
    source = FrameSource(
        frame, universes={"two": ["S01", "S02"], "spans": {"S03": [("2018-02-01", "2018-03-01")]}}
    )
    assert source.universes() == ("all", "spans", "two")
    assert source.load(instruments="two").shape[1] == 2
    days = source.load(instruments="spans")
    assert str(days.calendar[days.mask[:, 0].numpy()][-1].date()) == "2018-03-01"
    with pytest.raises(DataError, match=r"universe 'x'.*unknown instrument 'S9'"):
        FrameSource(frame, universes={"x": ["S9"]})


def test_as_source_accepts_sources_and_frames(frame):
    source = FrameSource(frame)
    assert as_source(source) is source
    assert as_source(frame).fields() == source.fields()
    with pytest.raises(DataError, match="got list"):
        as_source([1])


def test_a_source_with_a_frame_has_no_config(frame):
    with pytest.raises(ConfigError, match=r"FrameSource\.frame"):
        FrameSource(frame).to_config()


def test_fingerprint_depends_on_bars_and_universes(frame):
    first = FrameSource(frame).fingerprint()
    assert FrameSource(frame.copy()).fingerprint() == first
    assert FrameSource(frame * 1.0001).fingerprint() != first
    assert FrameSource(frame, universes={"two": ["S01"]}).fingerprint() != first


def test_infinite_values_are_kept(frame):
    frame = frame.copy()
    frame.iloc[3, 1] = np.inf
    assert FrameSource(frame).load().column("close").isinf().sum() == 1


def intraday_frame(times, num_days=5, start="2024-01-02"):
    stamps = [d + pd.Timedelta(t) for d in pd.bdate_range(start, periods=num_days) for t in times]
    index = pd.MultiIndex.from_product([stamps, ["A", "B"]], names=["datetime", "instrument"])
    return pd.DataFrame({"close": np.arange(1.0, len(index) + 1)}, index)


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        (["10:00:00", "10:30:00", "11:00:00", "13:00:00", "13:30:00"], "30min"),
        ([f"{h}:30:00" for h in range(9, 16)], "60min"),
        ([f"{h:02}:00:00" for h in range(24)], "60min"),
        (["09:31:00", "09:32:00"], "1min"),
        (["16:00:00"], "day"),
        (["00:00:00"], "day"),
    ],
)
def test_the_frequency_is_detected(times, expected):
    source = FrameSource(intraday_frame(times))
    assert source.freq == expected
    assert source.frequencies() == (expected,)
    assert len(source.load(["close"]).calendar) == 5 * len(times)
    assert len(source.features("all", ["$close"], freq=expected)) == 10 * len(times)


def test_weeks_months_and_false_frequencies():
    weeks = intraday_frame(["00:00:00"], num_days=100).unstack().iloc[::5].stack()
    assert FrameSource(weeks).freq == "week"
    months = pd.MultiIndex.from_product(
        [pd.date_range("2020-01-31", periods=12, freq="ME"), ["A"]],
        names=["datetime", "instrument"],
    )
    assert FrameSource(pd.DataFrame({"close": 1.0}, months)).freq == "month"
    with pytest.raises(DataError, match=r"freq='day', but several bars .* look like '30min'"):
        FrameSource(intraday_frame(["10:00:00", "10:30:00"]), freq="day")
    with pytest.raises(DataError, match="resample them, or pass the frequency"):
        FrameSource(intraday_frame(["10:00:00", "10:00:10"]))
