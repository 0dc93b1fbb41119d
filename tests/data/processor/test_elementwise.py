from __future__ import annotations

import numpy as np
import torch

from qtorch.data.panel.frames import view_from_frame
from qtorch.data.processor import Fillna, ProcessInf, TanhProcess


def test_fillna_fills_only_the_group_and_keeps_infinite_values(frame, watch_view) -> None:
    frame.iloc[3, 0] = np.inf
    view = view_from_frame(frame)
    check = watch_view(view)
    result = Fillna(fields_group="feature", fill_value=7.0)(view).frame()
    assert (result["feature"] == frame.sort_index()["feature"].fillna(7.0)).all().all()
    assert result["label"].isna().any().any()
    all_groups = Fillna()(view).frame()
    assert not all_groups.isna().any().any()
    check()


def test_tanh_does_not_change_labels(frame, view, watch_view) -> None:
    check = watch_view(view)
    result = TanhProcess()(view).frame()
    expected = np.tanh(frame.sort_index()["feature"].astype(np.float64) - 1)
    np.testing.assert_allclose(result["feature"], expected, atol=1e-6)
    np.testing.assert_array_equal(result["label"], frame.sort_index()["label"])
    check()


def test_infinite_values_become_the_mean_of_finite_values(frame, watch_view) -> None:
    frame = frame.sort_index()
    day = frame.index.get_level_values("datetime") == frame.index[0][0]
    frame.iloc[0, 0], frame.iloc[1, 0] = np.inf, -np.inf
    finite = frame.loc[day, ("feature", "x")].replace([np.inf, -np.inf], np.nan)
    view = view_from_frame(frame)
    check = watch_view(view)
    result = ProcessInf()(view)
    x = result.frame().loc[day, ("feature", "x")].to_numpy()
    np.testing.assert_allclose(x[:2], finite.mean(), rtol=1e-6)
    np.testing.assert_array_equal(x[2:], finite.to_numpy()[2:])
    # A column without infinite values is not copied.
    before, after = view.group("feature").column("y"), result.group("feature").column("y")
    assert before.data_ptr() == after.data_ptr()
    check()


def test_a_day_without_finite_values_becomes_nan() -> None:
    import pandas as pd

    index = pd.MultiIndex.from_product(
        [pd.bdate_range("2020-01-01", periods=2), ["a", "b"]], names=["datetime", "instrument"]
    )
    frame = pd.DataFrame({"x": [np.inf, np.nan, 1.0, 2.0]}, index)
    result = ProcessInf()(view_from_frame(frame)).groups[""].column("x")
    torch.testing.assert_close(
        result, torch.tensor([[np.nan, np.nan], [1.0, 2.0]], dtype=torch.float32), equal_nan=True
    )


def test_tanh_knows_labels_by_their_group(frame) -> None:
    """Qlib looks for "LABEL" in the name (its issues 1687, 2171, 2313)."""
    frame = frame.rename(columns={"x": "LABEL_LIKE", frame["label"].columns[0]: "RET1"})
    view = view_from_frame(frame)
    result = TanhProcess()(view).frame()
    expected = np.tanh(frame.sort_index()["feature"].astype(np.float64) - 1)
    np.testing.assert_allclose(result["feature"], expected, atol=1e-6)
    np.testing.assert_array_equal(result["label"], frame.sort_index()["label"])
    only_labels = TanhProcess(fields_group="label")(view).frame()
    np.testing.assert_array_equal(only_labels["feature"], frame.sort_index()["feature"])
    assert not np.array_equal(only_labels["label"], frame.sort_index()["label"])


def test_tanh_of_data_without_groups_leaves_columns_called_label(frame) -> None:
    flat = frame.droplevel(0, axis=1).sort_index()
    flat.columns = ["x", "y", *[f"LABEL{k}" for k in range(flat.shape[1] - 2)]]
    view = view_from_frame(flat)
    before, after = view.groups[""], TanhProcess()(view).groups[""]
    for name, expected in (
        ("LABEL0", before.column("LABEL0")),
        ("x", (before.column("x") - 1).tanh()),
    ):
        torch.testing.assert_close(after.column(name), expected, equal_nan=True)
