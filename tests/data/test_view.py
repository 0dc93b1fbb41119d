from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from qtorch.core.errors import DataError
from qtorch.data.columns import PanelColumns
from qtorch.data.elementwise import FillNaN
from qtorch.data.panel import Panel
from qtorch.data.view import View

DATES = pd.bdate_range("2020-01-01", periods=4)


def view(instruments=("B", "A", "C")) -> View:
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


def test_the_frame_is_in_order_of_date_and_name_and_holds_every_value():
    made = view()
    frame = made.frame()
    assert frame.index.names == ["datetime", "instrument"]
    assert frame.index.is_monotonic_increasing
    assert len(frame) == 11
    assert (DATES[1], "B") not in frame.index
    assert frame.columns.tolist()[0] == ("feature", "F0")
    assert frame.columns.tolist()[-1] == ("label", "F19")
    assert (frame.dtypes == np.float32).all()
    for group, name in frame.columns:
        column = made.groups[group].column(name)
        for d, date in enumerate(DATES):
            for n, who in enumerate(made.instruments):
                if (date, who) in frame.index:
                    assert frame.loc[(date, who), (group, name)] == column[d, n].item()


def test_a_frame_of_dates_and_groups():
    frame = view().frame(start="2020-01-02", end="2020-01-03", groups=["label"])
    assert frame.columns.tolist() == [("label", "F18"), ("label", "F19")]
    assert frame.index.get_level_values("datetime").unique().tolist() == list(DATES[1:3])
    assert len(view().frame(start="2021-01-01")) == 0


def test_sample_rows_narrow_and_keep_calendar_rows():
    made = view()
    mask = torch.zeros(4, 3, dtype=torch.bool)
    mask[2:] = True
    date, who = made.sample_rows(slice(1, 4), mask)
    assert date.tolist() == [2, 2, 2, 3, 3, 3]
    assert who.tolist() == [1, 0, 2] * 2  # A, B, C
    assert made.index(date, who).tolist()[0] == (DATES[2], "A")


def test_a_view_is_not_changed_by_its_children():
    made = view()
    fewer = made.with_rows(made.rows & False)
    filled = made.with_group("feature", made.groups["feature"].with_elementwise(["F0"], FillNaN()))
    assert int(made.rows.sum()) == 11
    assert int(fewer.rows.sum()) == 0
    assert fewer.history is made.history
    assert filled.groups["label"] is made.groups["label"]
    assert filled.groups["feature"] is not made.groups["feature"]


def test_what_does_not_fit_is_refused():
    made = view()
    with pytest.raises(DataError, match=r"rows must be bool of shape \(4, 3\)"):
        made.with_rows(torch.ones(3, 3, dtype=torch.bool))
    with pytest.raises(DataError, match=r"unknown group of columns 'labels'.*'label'"):
        made.group("labels")
    other = Panel(torch.zeros(5, 3, 1), pd.bdate_range("2020", periods=5), list("ABC"), ["X"])
    with pytest.raises(DataError, match="group 'extra' has shape"):
        made.with_group("extra", PanelColumns(other))
    with pytest.raises(DataError, match="at least one group"):
        View({}, made.rows, made.history)
