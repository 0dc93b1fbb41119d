from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from qtorch.core.errors import DataError
from qtorch.data.panel.columns import PanelColumns
from qtorch.data.panel.elementwise import FillNaN
from qtorch.data.panel.panel import Panel
from qtorch.data.panel.view import View

DATES = pd.bdate_range("2020-01-01", periods=4)


def make_view(instruments=("B", "A", "C")) -> View:
    torch.manual_seed(0)
    panel = Panel(torch.randn(4, 3, 20), DATES, instruments, [f"F{k}" for k in range(20)])
    rows = torch.ones(4, 3, dtype=torch.bool)
    rows[1, 0] = False
    names = panel.fields
    return View(
        {"feature": PanelColumns(panel, names[:18]), "label": PanelColumns(panel, names[18:])},
        rows=rows,
        history=torch.ones_like(rows),
    )


def test_the_frame_contains_every_value_in_order_of_date_and_name():
    view = make_view()
    frame = view.frame()
    assert frame.index.names == ["datetime", "instrument"]
    assert frame.index.is_monotonic_increasing
    assert len(frame) == 11
    assert (DATES[1], "B") not in frame.index
    assert frame.columns.tolist()[0] == ("feature", "F0")
    assert frame.columns.tolist()[-1] == ("label", "F19")
    assert (frame.dtypes == np.float32).all()
    for group, name in frame.columns:
        column = view.groups[group].column(name)
        for d, date in enumerate(DATES):
            for n, instrument in enumerate(view.instruments):
                if (date, instrument) in frame.index:
                    assert frame.loc[(date, instrument), (group, name)] == column[d, n].item()


def test_a_frame_of_dates_and_groups():
    frame = make_view().frame(start="2020-01-02", end="2020-01-03", groups=["label"])
    assert frame.columns.tolist() == [("label", "F18"), ("label", "F19")]
    assert frame.index.get_level_values("datetime").unique().tolist() == list(DATES[1:3])
    assert len(make_view().frame(start="2021-01-01")) == 0


def test_sample_rows_apply_the_mask_and_return_calendar_rows():
    view = make_view()
    mask = torch.zeros(4, 3, dtype=torch.bool)
    mask[2:] = True
    date, instrument = view.sample_rows(slice(1, 4), mask)
    assert date.tolist() == [2, 2, 2, 3, 3, 3]
    assert instrument.tolist() == [1, 0, 2] * 2  # A, B, C
    assert view.index(date, instrument).tolist()[0] == (DATES[2], "A")


def test_derived_views_do_not_change_the_original():
    view = make_view()
    empty_view = view.with_rows(view.rows & False)
    filled_view = view.with_group(
        "feature", view.groups["feature"].with_elementwise(["F0"], FillNaN())
    )
    assert int(view.rows.sum()) == 11
    assert int(empty_view.rows.sum()) == 0
    assert empty_view.history is view.history
    assert filled_view.groups["label"] is view.groups["label"]
    assert filled_view.groups["feature"] is not view.groups["feature"]


def test_inconsistent_shapes_and_unknown_groups_are_refused():
    view = make_view()
    with pytest.raises(DataError, match=r"rows must be bool of shape \(4, 3\)"):
        view.with_rows(torch.ones(3, 3, dtype=torch.bool))
    with pytest.raises(DataError, match=r"unknown group of columns 'labels'.*'label'"):
        view.group("labels")
    other_panel = Panel(torch.zeros(5, 3, 1), pd.bdate_range("2020", periods=5), list("ABC"), ["X"])
    with pytest.raises(DataError, match="group 'extra' has shape"):
        view.with_group("extra", PanelColumns(other_panel))
    with pytest.raises(DataError, match="at least one group"):
        View({}, view.rows, view.history)
