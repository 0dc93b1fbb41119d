from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from qtorch.core.errors import ConfigError, DataError
from qtorch.data.panel.frames import view_from_frame
from qtorch.data.processor import CSRankNorm, CSZFillna, CSZScoreNorm


def group_by_day(frame: pd.DataFrame) -> pd.core.groupby.DataFrameGroupBy:
    return frame.sort_index().astype(np.float64).groupby("datetime", group_keys=False)


def test_only_the_selected_group_changes(frame, view, watch_view) -> None:
    check = watch_view(view)
    result = CSRankNorm(fields_group="label")(view)
    expected = (group_by_day(frame["label"]).rank(pct=True) - 0.5) * 3.46
    np.testing.assert_allclose(result.frame()["label"], expected, atol=1e-5)
    before, after = view.group("feature"), result.group("feature")
    assert before is after
    check()


def test_several_groups(frame, view) -> None:
    result = CSZScoreNorm(fields_group=["feature", "label"])(view).frame()
    expected = group_by_day(frame).transform(lambda x: (x - x.mean()) / x.std())
    np.testing.assert_allclose(result, expected, atol=1e-5)


def test_one_column_of_a_group(frame, view) -> None:
    result = CSZScoreNorm(fields_group=[("feature", "y")])(view).frame()
    expected = group_by_day(frame[[("feature", "y")]]).transform(lambda x: (x - x.mean()) / x.std())
    np.testing.assert_allclose(result[[("feature", "y")]], expected, atol=1e-5)
    pd.testing.assert_frame_equal(result[[("feature", "x")]], view.frame()[[("feature", "x")]])


def test_missing_values_become_the_mean_of_the_day(frame, view) -> None:
    result = CSZFillna(fields_group="feature")(view).frame()["feature"]
    expected = group_by_day(frame["feature"]).transform(lambda x: x.fillna(x.mean()))
    np.testing.assert_allclose(result, expected, atol=1e-6)


def test_an_unknown_method_raises() -> None:
    with pytest.raises(ConfigError, match="unknown method of CSZScoreNorm 'zscores'"):
        CSZScoreNorm(method="zscores")


@pytest.mark.parametrize("processor", [CSRankNorm(), CSZScoreNorm()])
def test_a_single_instrument_raises(frame, processor) -> None:
    single = frame[frame.index.get_level_values("instrument") == "a"]
    with pytest.raises(DataError, match=r"CS.*Norm compares the instruments of a day"):
        processor(view_from_frame(single))
    frame_with_pair = pd.concat(
        [single, frame[frame.index.get_level_values("instrument") == "b"].iloc[:1]]
    )
    processor(view_from_frame(frame_with_pair.sort_index()))
    CSZFillna()(view_from_frame(single))
