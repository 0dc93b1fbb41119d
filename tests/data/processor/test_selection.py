from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from qtorch.core.errors import ConfigError, DataError
from qtorch.data.panel.frames import view_from_frame
from qtorch.data.processor import (
    DropCol,
    DropnaLabel,
    DropnaProcessor,
    FilterCol,
    HashStockFormat,
    TimeRangeFlt,
)


def test_filter_keeps_the_data_order_and_other_groups(view, watch_view) -> None:
    check = watch_view(view)
    col_list = ["z", "x"]
    result = FilterCol(fields_group="feature", col_list=col_list)(view)
    assert result.group("feature").names == ("x", "z")
    assert result.group("label").names == ("LABEL0",)
    assert col_list == ["z", "x"]
    check()


def test_filter_raises_for_an_unknown_column(view) -> None:
    with pytest.raises(ConfigError, match="FilterCol: unknown column 'LABEL'"):
        FilterCol(col_list=["x", "LABEL"])(view)


def test_drop_removes_columns_from_every_group(view) -> None:
    result = DropCol(col_list=["y", "LABEL0", "other"])(view)
    assert result.group("feature").names == ("x", "z")
    assert result.group("label").names == ()


def test_hash_stock_format_returns_the_view(view) -> None:
    assert HashStockFormat()(view) is view


def test_dropna_label_drops_samples_but_not_history(frame, view, watch_view) -> None:
    check = watch_view(view)
    result = DropnaLabel()(view)
    expected = frame.sort_index().dropna(subset=[("label", "LABEL0")])
    assert result.frame().index.equals(expected.index)
    assert torch.equal(result.history, view.history)
    assert not DropnaLabel().is_for_infer()
    check()


def test_a_label_that_is_always_nan_raises(frame) -> None:
    frame["label"] = np.nan
    with pytest.raises(DataError, match=r"drops all 81 rows.*NaN.*LABEL0"):
        DropnaLabel()(view_from_frame(frame))


@pytest.mark.parametrize("group", ["feature", None])
def test_dropna_also_drops_rows_from_windows(frame, view, group) -> None:
    result = DropnaProcessor(fields_group=group)(view)
    columns = frame.columns if group is None else [c for c in frame.columns if c[0] == group]
    expected = frame.sort_index().dropna(subset=list(columns))
    assert result.frame().index.equals(expected.index)
    assert torch.equal(result.history, result.rows)


def test_infinite_values_are_not_missing(frame) -> None:
    frame = frame.fillna(0.0)
    frame.iloc[0, 0] = np.inf
    assert len(DropnaProcessor()(view_from_frame(frame)).frame()) == len(frame)


def test_time_range_keeps_instruments_that_cover_it() -> None:
    dates = pd.bdate_range("2020-01-01", periods=10)
    spans = {"whole": (0, 9), "late": (3, 9), "early": (0, 6), "hole": (0, 9)}
    rows = [(dates[d], k) for k, (a, b) in spans.items() for d in range(a, b + 1)]
    rows = [r for r in rows if r[1] != "hole" or r[0] not in dates[4:6]]
    index = pd.MultiIndex.from_tuples(rows, names=["datetime", "instrument"])
    view = view_from_frame(pd.DataFrame({"x": 1.0}, index))

    def select_instruments(start, end) -> set[str]:
        result = TimeRangeFlt(start, end)(view).frame()
        return set(result.index.get_level_values("instrument"))

    assert select_instruments(dates[0], dates[9]) == {"whole", "hole"}
    assert select_instruments(dates[0], None) == {"whole", "early", "hole"}
    assert select_instruments(None, dates[9]) == {"whole", "late", "hole"}
    assert select_instruments(dates[3], dates[6]) == {"whole", "late", "early", "hole"}
    # Dates on a weekend select the next trading day as start and the previous one as end.
    assert select_instruments("2020-01-04", "2020-01-12") == {"whole", "late", "hole"}
