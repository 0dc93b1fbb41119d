"""Frames that come from elsewhere become indexed by (datetime, instrument)."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from qtorch.core.errors import DataError, DuplicateRowError
from qtorch.data.panel.frames import index_frame, read_frame, view_from_frame
from qtorch.data.panel.panel import Panel
from qtorch.data.panel.window_columns import count_window_steps


def test_level_without_a_name_beside_a_named_one_is_the_other():
    index = pd.MultiIndex.from_product([pd.bdate_range("2020-01-01", periods=2), ["A", "B"]])
    for names in (["datetime", None], [None, "instrument"]):
        frame = pd.DataFrame({"weight": 1.0}, index=index.set_names(names))
        assert list(index_frame(frame).index.names) == ["datetime", "instrument"]


def test_a_frame_of_window_columns_is_gathered_as_windows():
    names = [f"{field}{k}" for field in ("CLOSE", "VOLUME") for k in (2, 1, 0)]
    index = pd.MultiIndex.from_product(
        [pd.bdate_range("2020-01-01", periods=4), ["A", "B"]], names=["datetime", "instrument"]
    )
    values = np.arange(48, dtype=np.float32).reshape(8, 6)
    columns = pd.MultiIndex.from_product([["feature"], names])
    view = view_from_frame(pd.DataFrame(values, index=index, columns=columns))
    features = view.group("feature")
    assert features.window_shape(1) == (3, 2)
    packed = features.pack(history=view.history)
    x = packed.gather(torch.tensor([2]), torch.tensor([1]))
    assert x.shape == (1, *packed.window_shape(1))
    np.testing.assert_array_equal(x[0].t().flatten(), values[2 * 2 + 1])
    # Longer windows, and other columns, are rows of columns.
    assert packed.gather(torch.tensor([2]), torch.tensor([1]), 2).shape == (1, 2, 6)
    assert features.window_shape(2) == (2, 6)
    some = features.keep(names[1:])
    assert some.window_shape(1) == (1, 5)
    assert some.pack().gather(torch.tensor([2]), torch.tensor([1])).shape == (1, 1, 5)
    close = features.keep(names[:3]).pack()
    assert close.gather(torch.tensor([0]), torch.tensor([0]))[0, :, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "names",
    [
        [],
        ["OPEN0", "HIGH0"],
        ["ROC5", "ROC10"],
        ["a1", "a0", "b0"],
        ["a1", "a0", "b0", "b1"],
        ["7"],
    ],
)
def test_other_columns_are_no_windows(names):
    assert count_window_steps(names) == 1


def bars_with_duplicates():
    """Three dates of two tickers in columns, of which two rows occur twice; index 0..7."""
    days = pd.bdate_range("2021-01-04", periods=3)
    rows = [(day, ticker) for ticker in ("A", "B") for day in days]
    table = pd.DataFrame(rows, columns=["Date", "ticker"]).assign(close=np.arange(6.0))
    return pd.concat([table, table.iloc[[0, 4]]], ignore_index=True)


# How the keys are stored, and how a user drops the duplicates there.
DUPLICATE_ADVICE = {
    "columns": (lambda table: table, "frame.drop_duplicates(['Date', 'ticker'])"),
    "dates in the index": (
        lambda table: table.set_index("Date"),
        "frame.reset_index().drop_duplicates(['Date', 'ticker'])",
    ),
    "dates in an index without a name": (
        lambda table: table.set_index(table.pop("Date").rename(None)),
        "frame.rename_axis('datetime').reset_index().drop_duplicates(['datetime', 'ticker'])",
    ),
    "index": (
        lambda table: table.set_index(["Date", "ticker"]),
        "frame[~frame.index.duplicated()]",
    ),
    "three levels of the index": (
        lambda table: table.assign(sector=1.0).set_index(["Date", "ticker", "sector"]),
        "frame.reset_index().drop_duplicates(['Date', 'ticker'])",
    ),
}


@pytest.mark.parametrize("order", [None, ["Date", "ticker"], ["ticker", "Date"]])
def test_the_advice_for_duplicate_rows_of_a_file_names_it(tmp_path, order):
    table = bars_with_duplicates()
    path = tmp_path / "bars.parquet"
    (table if order is None else table.set_index(order)).to_parquet(path)
    with pytest.raises(DuplicateRowError) as error:
        read_frame(path)
    text = f"duplicate row (2021-01-04, A), 2 in all; keep one of each in {path}."
    assert str(error.value) == text


def test_columns_by_field_and_instrument_that_occur_twice_are_refused():
    columns = pd.MultiIndex.from_tuples([("Close", "A")] * 2, names=["Price", "Ticker"])
    frame = pd.DataFrame(1.0, pd.bdate_range("2020-01-01", periods=3), columns)
    with pytest.raises(DataError, match=r"several columns have the name \('Close', 'A'\)"):
        index_frame(frame)


@pytest.mark.parametrize("location", DUPLICATE_ADVICE)
def test_the_advice_for_duplicate_rows_drops_them_and_no_others(location):
    convert, advice = DUPLICATE_ADVICE[location]
    frame = convert(bars_with_duplicates())
    with pytest.raises(DuplicateRowError, match=r"\(2021-01-04, A\), 2 in all") as error:
        Panel.from_frame(index_frame(frame))
    assert advice in str(error.value)
    panel = Panel.from_frame(index_frame(eval(advice, {"frame": frame})))
    assert panel.shape[:2] == (3, 2)
    assert panel.column("close").T.flatten().tolist() == list(range(6))
