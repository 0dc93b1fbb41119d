"""Frames that come from elsewhere become indexed by (datetime, instrument)."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from qtorch.data.panel.frames import index_frame, view_from_frame
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
