"""The behaviour of every source: expressions, membership spans, and user-defined sources."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from qtorch.core.errors import ArgumentError, DataError
from qtorch.data.panel.panel import Panel
from qtorch.data.source.base import Bars, Source, extend_to_day_end, frequency


def test_features_have_expression_columns_and_instrument_date_rows(market):
    expressions = ["$close", "Mean($close, 5)", "Ref($close, -2)/Ref($close, -1)-1"]
    frame = market.features(["S03", "S01"], expressions, "2018-06-01", "2018-06-29")
    assert frame.index.names == ["instrument", "datetime"]
    assert list(frame.columns) == expressions
    assert frame.index.is_monotonic_increasing
    assert frame.index.get_level_values(0).unique().tolist() == ["S01", "S03"]
    panel = market.load(["close"], instruments=["S03"])
    close = pd.Series(panel.column("close")[:, 0].double().numpy(), panel.calendar)
    days = slice("2018-06-01", "2018-06-29")
    # Windows use rows before the first date, and the label uses rows after the last.
    mean = close.rolling(5, min_periods=1).mean()[days]
    label = (close.shift(-2) / close.shift(-1) - 1)[days]
    features = frame.xs("S03")
    np.testing.assert_allclose(features["Mean($close, 5)"], mean, rtol=1e-5)
    np.testing.assert_allclose(features.iloc[:, 2], label, atol=1e-6)


def test_unbounded_windows_use_the_history_before_the_start(market):
    whole = market.features(["S03"], ["EMA($close, 200)"])
    late = market.features(["S03"], ["EMA($close, 200)"], "2019-06-03")
    np.testing.assert_allclose(late, whole[-len(late) :], rtol=1e-6)


def test_features_require_a_list_of_expressions(market):
    with pytest.raises(DataError, match="list of expressions"):
        market.features("all", "$close")
    with pytest.raises(DataError, match="list of expressions"):
        market.features("all", [])
    with pytest.raises(DataError, match=r"'clos'.*'close'"):
        market.features("all", ["Mean($clos, 5)"])


def test_unknown_constructor_arguments_raise():
    from qtorch.data.source.synthetic import SyntheticSource

    with pytest.raises(ArgumentError, match=r"'num_instrument'.*'num_instruments'"):
        SyntheticSource(num_instrument=3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("day", "day"), ("1d", "day"), ("1day", "day"), ("min", "1min"), ("30minute", "30min"),
     ("5MIN", "5min"), ("week", "week"), ("2w", "2week")],
)  # fmt: skip
def test_frequency_names_are_normalized(text, expected):
    assert frequency(text) == expected


def test_a_span_end_without_a_time_includes_its_whole_day():
    ends = ["2020-01-02", "2020-01-02 10:00", pd.Timestamp.max, pd.Timestamp.max.normalize()]
    ends = pd.DatetimeIndex(ends).as_unit("ns")
    new_ends = extend_to_day_end(ends)
    assert new_ends[0] == pd.Timestamp("2020-01-02 23:59:59.999999999")
    assert list(new_ends[1:]) == list(ends[1:])


class ThreeDaySource(Source):
    """A minimal user-defined source."""

    days = pd.bdate_range("2020-01-01", periods=3, unit="ns")

    def read_calendar(self, freq):
        return self.days

    def read_membership(self, universe):
        return {"A": [(self.days[1], self.days[2])], "B": [(self.days[0], self.days[0])]}

    def read_bars(self, instruments, fields, freq, rows):
        values = torch.arange(3.0)[None, rows, None].expand(len(fields), -1, len(instruments))
        return Bars(values, torch.tensor([[0, 2]]).repeat(len(instruments), 1) - rows.start)

    def fields(self, freq="day"):
        return ("close",)

    def universes(self):
        return ("all",)

    def fingerprint(self):
        return "three"


def test_a_user_defined_source():
    panel = ThreeDaySource().load()
    assert isinstance(panel, Panel)
    assert panel.mask.int().tolist() == [[0, 1], [1, 0], [1, 0]]
    assert ThreeDaySource().load(start_time="2020-01-02").instruments.tolist() == ["A"]
    assert ThreeDaySource().features("all", ["Ref($close, 1)"]).iloc[:, 0].tolist()[:2] == [0, 1]


def test_infinite_bars_are_logged(caplog):
    class InfiniteSource(ThreeDaySource):
        def read_bars(self, instruments, fields, freq, rows):
            bars = super().read_bars(instruments, fields, freq, rows)
            values = bars.values.clone()
            values[0, 1, 0] = float("inf")
            return Bars(values, bars.spans)

    ThreeDaySource().load()
    assert "infinite" not in caplog.text
    InfiniteSource().load()
    assert "infinite values in the bars: close (1), first A on 2020-01-02" in caplog.text
