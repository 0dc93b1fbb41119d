from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtorch.core.errors import ConfigError
from qtorch.data.dataset.samples import check_segments, purge_rows


def test_a_label_two_days_ahead_purges_two_days():
    # Rows 0..9, the next segment begins at row 10: the label of row 8 is known at row 10.
    assert purge_rows(slice(0, 10), [10], 2) == slice(0, 8)
    # With a gap of one row between the segments, only the last row's label reaches across it.
    assert purge_rows(slice(0, 10), [11], 2) == slice(0, 9)
    assert purge_rows(slice(0, 10), [12], 2) == slice(0, 10)
    # Earlier segments, and the segment itself, purge nothing.
    assert purge_rows(slice(5, 10), [0, 5], 2) == slice(5, 10)
    assert purge_rows(slice(0, 10), [10], 0) == slice(0, 10)
    assert purge_rows(slice(0, 3), [3], 7) == slice(0, 0)


@given(
    start=st.integers(0, 30),
    length=st.integers(0, 30),
    starts=st.lists(st.integers(0, 80), max_size=4),
    horizon=st.integers(0, 20),
)
def test_labels_of_the_remaining_rows_reach_no_later_segment(start, length, starts, horizon):
    rows = slice(start, start + length)
    remaining = purge_rows(rows, starts, horizon)
    expected_rows = [
        d
        for d in range(rows.start, rows.stop)
        if not any(s >= rows.stop and d + horizon >= s for s in starts) or horizon == 0
    ]
    assert list(range(remaining.start, remaining.stop)) == expected_rows


def test_overlapping_segments_are_refused():
    check_segments({"train": ("2008-01-01", "2014-12-31"), "valid": ("2015-01-01", None)})
    with pytest.raises(ConfigError, match=r"'train' \(to 2015-01-01\) and 'valid' \(from 2015-01"):
        check_segments(
            {"valid": ("2015-01-01", "2015-12-31"), "train": ("2008-01-01", "2015-01-01")}
        )
    with pytest.raises(ConfigError, match="overlap"):
        check_segments({"train": (None, None), "test": ("2016-01-01", None)})
    with pytest.raises(ConfigError, match=r"ends .* before it starts"):
        check_segments({"train": ("2015-01-01", "2014-01-01")})
    with pytest.raises(
        ConfigError, match=r"segment 'valid' \(2015-01-01\.\.abc\): the dates cannot"
    ):
        check_segments({"valid": ("2015-01-01", "abc")})
