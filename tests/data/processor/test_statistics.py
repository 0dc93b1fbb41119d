from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from qtorch.core.errors import ConfigError, DataError, NotFittedError
from qtorch.data.panel.columns import PanelColumns
from qtorch.data.panel.panel import Panel
from qtorch.data.panel.view import View
from qtorch.data.processor import MinMaxNorm, RobustZScoreNorm, ZScoreNorm

WINDOW = ("2020-01-03", "2020-01-10")


def pandas_result(kind: str, frame: pd.DataFrame) -> pd.DataFrame:
    """Normalize the features with pandas in float64 and statistics of the window."""
    x = frame["feature"].astype(np.float64)
    fit_rows = x.loc[WINDOW[0] : WINDOW[1]]
    if kind == "MinMaxNorm":
        return (x - fit_rows.min()) / (fit_rows.max() - fit_rows.min())
    if kind == "ZScoreNorm":
        return (x - fit_rows.mean()) / fit_rows.std(ddof=0)
    middle = fit_rows.median()
    spread = ((fit_rows - middle).abs().median() + 1e-12) * 1.4826
    return ((x - middle) / spread).clip(-3, 3)


@pytest.mark.parametrize("kind", [MinMaxNorm, ZScoreNorm, RobustZScoreNorm])
def test_statistics_of_the_fit_window_are_applied_to_all_rows(
    kind, frame, view, watch_view
) -> None:
    check = watch_view(view)
    processor = kind(*WINDOW, fields_group="feature")
    processor.fit(view)
    result = processor(view)
    expected = pandas_result(kind.__name__, frame.sort_index())
    pd.testing.assert_frame_equal(
        result.frame()["feature"].astype(np.float64), expected, atol=1e-5, check_index_type=False
    )
    labels = result.frame()["label"]
    pd.testing.assert_frame_equal(labels, view.frame()["label"])
    check()


def test_without_a_group_labels_are_normalized_too(view) -> None:
    processor = ZScoreNorm(*WINDOW)
    processor.fit(view)
    assert ("label", "LABEL0") in (processor.columns_ or ())
    assert not torch.equal(
        processor(view).group("label").column("LABEL0").nan_to_num(),
        view.group("label").column("LABEL0").nan_to_num(),
    )


def test_statistics_ignore_rows_outside_the_view(frame, view) -> None:
    mask = view.rows.clone()
    mask[:, 2:] = False
    processor = ZScoreNorm(*WINDOW, fields_group="feature")
    processor.fit(view.with_rows(mask))
    view_frame = frame[frame.index.get_level_values("instrument").isin(["a", "b"])].sort_index()
    mean = view_frame["feature"].loc[WINDOW[0] : WINDOW[1]].mean().to_numpy()
    np.testing.assert_allclose(processor.center_.numpy(), mean, atol=1e-6)


@pytest.mark.parametrize("kind", [MinMaxNorm, ZScoreNorm])
@pytest.mark.parametrize("value", [0.1, 0.0, -3.7])
def test_a_constant_column_does_not_change(kind, value: float) -> None:
    values = torch.full((1, 30, 20), value).permute(1, 2, 0)
    panel = Panel(
        values, pd.bdate_range("2020-01-01", periods=30), list(map(str, range(20))), ["c"]
    )
    view = View({"feature": PanelColumns(panel)}, panel.mask, panel.mask)
    processor = kind()
    processor.fit(view)
    assert torch.equal(processor(view).group("feature").column("c"), values[..., 0])


def test_robust_zscore_of_empty_and_constant_columns() -> None:
    values = torch.full((2, 10, 4), float("nan"))
    values[1] = 2.0
    panel = Panel(
        values.permute(1, 2, 0),
        pd.bdate_range("2020-01-01", periods=10),
        list("abcd"),
        ["none", "flat"],
        mask=torch.ones(10, 4, dtype=torch.bool),
    )
    view = View({"feature": PanelColumns(panel)}, panel.mask, panel.mask)
    processor = RobustZScoreNorm()
    processor.fit(view)
    result = processor(view).group("feature")
    assert result.column("none").isnan().all()
    assert torch.equal(result.column("flat"), torch.zeros(10, 4))


def test_the_median_of_an_even_number_of_values_is_averaged() -> None:
    values = torch.tensor([1.0, 2.0, 10.0, 20.0]).reshape(2, 2, 1)
    panel = Panel(values, pd.bdate_range("2020-01-01", periods=2), ["a", "b"], ["x"])
    view = View({"feature": PanelColumns(panel)}, panel.mask, panel.mask)
    processor = RobustZScoreNorm(clip_outlier=False)
    processor.fit(view)
    assert float(processor.center_[0]) == 6.0
    assert float(processor.scale_[0]) == pytest.approx(4.5 * 1.4826, rel=1e-6)


def test_an_unfitted_processor_raises(view) -> None:
    with pytest.raises(NotFittedError, match="ZScoreNorm is not fitted"):
        ZScoreNorm()(view)


def test_a_fit_window_without_rows_raises(view) -> None:
    with pytest.raises(DataError, match=r"has no rows; the data has 2020-01-01\.\."):
        ZScoreNorm("1999-01-01", "1999-12-31").fit(view)


def test_an_unknown_group_raises_with_the_nearest_name(view) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'feature'"):
        ZScoreNorm(fields_group="features").fit(view)


def test_the_fitted_state_is_saved_and_loaded(view) -> None:
    first = RobustZScoreNorm(*WINDOW, fields_group="feature")
    first.fit(view)
    state = first.get_fitted_state()
    assert state is not None
    assert state.config == {"columns": [["feature", n] for n in "xyz"]}
    second = RobustZScoreNorm(*WINDOW, fields_group="feature")
    second.load_fitted_state(state)
    pd.testing.assert_frame_equal(second(view).frame(), first(view).frame())


def test_statistics_are_matched_by_column_name(view) -> None:
    processor = ZScoreNorm(*WINDOW, fields_group="feature")
    processor.fit(view)
    narrow = view.with_group("feature", view.group("feature").keep(["z", "x"]))
    pd.testing.assert_frame_equal(
        processor(narrow).frame()["feature"], processor(view).frame()["feature"][["z", "x"]]
    )
