"""The panel: shapes, selection, windows, and conversion from and to frames."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtorch.core.dates import date_rows
from qtorch.core.errors import DataError
from qtorch.data.panel.panel import Panel, clip_spans, normalise_calendar, within_spans

NAN = float("nan")


def small_frame() -> pd.DataFrame:
    dates = pd.to_datetime(["2020-01-02", "2020-01-03", "2020-01-06"])
    rows = [(dates[0], "A"), (dates[1], "A"), (dates[2], "A"), (dates[1], "B"), (dates[2], "B")]
    index = pd.MultiIndex.from_tuples(rows, names=["datetime", "instrument"])
    return pd.DataFrame({"close": [1.0, NAN, 3.0, 4.0, 5.0], "volume": [1, 2, 3, 4, 5]}, index)


def small_panel() -> Panel:
    return Panel.from_frame(small_frame())


# -- dates ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_calendar_is_converted_to_nanoseconds(unit):
    index = normalise_calendar(pd.date_range("2020-01-01", periods=3).as_unit(unit))
    assert index.dtype == "datetime64[ns]"
    assert index.asi8[1] - index.asi8[0] == 86_400 * 10**9


def test_time_zones_are_refused_with_a_fix():
    with pytest.raises(DataError, match=r"time zone UTC.*tz_localize\(None\)"):
        normalise_calendar(pd.date_range("2020-01-01", periods=3, tz="UTC"))


def test_values_that_are_not_dates_are_refused():
    with pytest.raises(DataError, match="cannot be parsed"):
        normalise_calendar(["2020-01-01", "yesterday-ish"])


def test_an_end_date_includes_its_whole_day():
    calendar = pd.date_range("2020-01-02 09:30", periods=4, freq="6h")
    assert date_rows(calendar, "2020-01-02", "2020-01-02") == slice(0, 3)
    assert date_rows(calendar, None, "2020-01-02 15:30") == slice(0, 2)
    assert date_rows(calendar, "2020-02-01", "2020-01-01").start == 4


def test_a_selection_refuses_dates_with_a_time_zone():
    with pytest.raises(DataError, match="time zone"):
        small_panel().rows("2020-01-02T00:00:00+00:00")
    with pytest.raises(DataError, match="not a date"):
        small_panel().rows("soon")


# -- building ------------------------------------------------------------------------------------


def test_shape_calendar_and_names_must_agree():
    dates = pd.date_range("2020-01-01", periods=2)
    with pytest.raises(DataError, match=r"shape \(2, 3, 1\).*\(2, 2, 1\)"):
        Panel(torch.zeros(2, 3, 1), dates, ["A", "B"], ["close"])
    with pytest.raises(DataError, match="instrument names must be unique"):
        Panel(torch.zeros(2, 2, 1), dates, ["A", "A"], ["close"])
    with pytest.raises(DataError, match="ascending"):
        Panel(torch.zeros(2, 1, 1), dates[::-1], ["A"], ["close"])


def test_spans_default_to_the_first_and_last_value():
    values = torch.tensor([[NAN, 1.0], [2.0, NAN], [NAN, 3.0], [4.0, NAN]])[..., None]
    panel = Panel(values, pd.date_range("2020-01-01", periods=4), ["A", "B"], ["close"])
    assert panel.spans.tolist() == [[1, 3], [0, 2]]
    assert panel.mask.T.int().tolist() == [[0, 1, 1, 1], [1, 1, 1, 0]]
    empty_panel = Panel(torch.full((4, 1, 1), NAN), panel.calendar, ["A"], ["close"])
    assert empty_panel.spans.tolist() == [[0, -1]]
    assert not empty_panel.mask.any()


def test_from_frame_places_each_value():
    panel = small_panel()
    assert panel.shape == (3, 2, 2)
    assert panel.column("volume").nan_to_num(-1).tolist() == [[1, -1], [2, 4], [3, 5]]
    assert panel.mask.int().tolist() == [[1, 0], [1, 1], [1, 1]]
    assert panel.spans.tolist() == [[0, 2], [1, 2]]


def test_a_row_with_only_nan_exists():
    frame = small_frame()
    frame.iloc[0] = NAN
    panel = Panel.from_frame(frame)
    assert bool(panel.mask[0, 0])
    assert panel.spans[0].tolist() == [0, 2]


@pytest.mark.parametrize("order", [["datetime", "instrument"], ["instrument", "datetime"]])
def test_from_frame_accepts_either_order_of_levels(order):
    frame = small_frame().reorder_levels(order)
    assert Panel.from_frame(frame).fingerprint() == small_panel().fingerprint()


def test_date_major_and_instrument_major_rows_are_the_same_panel():
    assert Panel.from_frame(small_frame().sort_index()).fingerprint() == small_panel().fingerprint()


def test_the_error_for_duplicate_rows_names_the_first_one():
    frame = pd.concat([small_frame(), small_frame().iloc[[4]]])
    with pytest.raises(DataError, match=r"duplicate row \(2020-01-06, B\), 1 in all"):
        Panel.from_frame(frame)


def test_the_advice_for_duplicate_rows_of_an_index_keeps_all_others():
    frame = pd.concat([small_frame(), small_frame().iloc[[0]]])
    with pytest.raises(DataError, match=r"1 in all.*frame\[~frame\.index\.duplicated\(\)\]"):
        Panel.from_frame(frame)
    kept_rows = frame[~frame.index.duplicated()]
    assert Panel.from_frame(kept_rows).fingerprint() == small_panel().fingerprint()


def test_the_rows_of_a_frame_may_be_in_any_order():
    frame = small_frame().iloc[[4, 2, 1, 0, 3]]
    assert Panel.from_frame(frame).fingerprint() == small_panel().fingerprint()


def test_other_invalid_frames_are_refused_with_a_fix():
    with pytest.raises(DataError, match=r"set_index\(\['datetime', 'instrument'\]\)"):
        Panel.from_frame(small_frame().reset_index())
    with pytest.raises(DataError, match="not numeric: 'name'"):
        Panel.from_frame(small_frame().assign(name="x"))
    no_date = small_frame().reset_index()
    no_date.loc[0, "datetime"] = pd.NaT
    with pytest.raises(DataError, match="no date"):
        Panel.from_frame(no_date.set_index(["datetime", "instrument"]))
    frame_with_zone = small_frame().reset_index()
    frame_with_zone["datetime"] = frame_with_zone["datetime"].dt.tz_localize("America/New_York")
    with pytest.raises(DataError, match="America/New_York"):
        Panel.from_frame(frame_with_zone.set_index(["datetime", "instrument"]))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 6))
def test_frame_round_trip(seed, num_dates, num):
    rng = np.random.default_rng(seed)
    values = torch.from_numpy(rng.normal(size=(num_dates, num, 2)).astype(np.float32))
    values[torch.from_numpy(rng.random((num_dates, num, 2)) < 0.3)] = NAN
    mask = torch.from_numpy(rng.random((num_dates, num)) < 0.7)
    dates = pd.date_range("2020-01-01", periods=num_dates)
    panel = Panel(values, dates, [f"I{k}" for k in range(num)], ["a", "b"], mask=mask)
    frame = panel.to_frame()
    expected_frame = pd.DataFrame(
        values.numpy()[mask.numpy()],
        index=pd.MultiIndex.from_tuples(
            [(dates[d], f"I{n}") for d in range(num_dates) for n in range(num) if mask[d, n]],
            names=["datetime", "instrument"],
        ),
        columns=["a", "b"],
    )
    if len(expected_frame):
        pd.testing.assert_frame_equal(frame, expected_frame, check_index_type=False)
        panel_from_frame = Panel.from_frame(frame)
        second_frame = panel_from_frame.to_frame()
        pd.testing.assert_frame_equal(second_frame, frame, check_index_type=False)
    else:
        assert len(frame) == 0


# -- selection -----------------------------------------------------------------------------------


def test_select_moves_spans_with_the_dates():
    panel = small_panel()
    late = panel.select(start="2020-01-03")
    assert late.spans.tolist() == [[0, 1], [0, 1]]
    early = panel.select(end="2020-01-02")
    assert early.spans.tolist() == [[0, 0], [0, -1]]
    assert early.mask.tolist() == [[True, False]]


def test_select_keeps_the_requested_order():
    some = small_panel().select(fields=["volume"], instruments=["B", "A"], end="2020-01-03")
    assert some.fields == ("volume",)
    assert list(some.instruments) == ["B", "A"]
    assert some.column("volume").nan_to_num(-1).tolist() == [[-1, 1], [4, 2]]


def test_select_without_fields_is_empty():
    assert small_panel().select(fields=[]).shape == (3, 2, 0)


def test_errors_for_unknown_names_suggest_the_nearest():
    with pytest.raises(DataError, match=r"unknown field 'volum'.*'volume'"):
        small_panel().column("volum")
    with pytest.raises(DataError, match="unknown instrument 'C'"):
        small_panel().select(instruments=["A", "C"])


def test_clip_spans_keeps_empty_spans_empty():
    spans = torch.tensor([[-5, -2], [-3, 1], [2, 9], [7, 9], [0, -1]])
    assert clip_spans(spans, 5).tolist() == [[0, -1], [0, 1], [2, 4], [0, -1], [0, -1]]
    assert within_spans(clip_spans(spans, 5), 5).sum(0).tolist() == [0, 2, 3, 0, 0]


# -- fingerprint ---------------------------------------------------------------------------------


def test_the_fingerprint_depends_on_content_not_on_storage():
    panel = small_panel()
    copy = Panel(
        panel.values.contiguous(),
        panel.calendar,
        panel.instruments,
        panel.fields,
        mask=panel.mask,
        spans=panel.spans,
    )
    assert copy.values.stride() != panel.values.stride()
    assert copy.fingerprint() == panel.fingerprint()
    for attribute in ("values", "mask"):
        changed_panel = small_panel()
        getattr(changed_panel, attribute)[2, 1] = 0
        assert changed_panel.fingerprint() != panel.fingerprint(), attribute
