from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from qtorch.core.errors import ArgumentError, DataError
from qtorch.data.dataset.reweighter import Reweighter, validate_weights

INDEX = pd.MultiIndex.from_product(
    [pd.bdate_range("2020-01-01", periods=2), ["A", "B"]], names=["datetime", "instrument"]
)


class Recent(Reweighter):
    """Halve the weight with each `half_life` days of age."""

    def __init__(self, half_life: float = 1.0) -> None:
        self.half_life = half_life

    def reweight(self, data: pd.DataFrame) -> pd.Series:
        age = (data.index.get_level_values(0).max() - data.index.get_level_values(0)).days
        return pd.Series(0.5 ** (age / self.half_life), index=data.index)


def test_a_user_defined_reweighter():
    data = pd.DataFrame({("label", "L"): np.arange(4.0)}, index=INDEX)
    weights = validate_weights(Recent(half_life=1.0).reweight(data), INDEX)
    assert weights.tolist() == [0.5, 0.5, 1.0, 1.0]
    assert weights.dtype == torch.float32
    assert Recent(half_life=2.0).to_config()["half_life"] == 2.0
    with pytest.raises(ArgumentError, match="half_life"):
        Recent(halflife=2.0)


@pytest.mark.parametrize("form", [list, np.array, torch.tensor, pd.array])
def test_weights_in_any_form(form):
    assert validate_weights(form([1.0, 2.0, 0.0, 3.0]), INDEX).tolist() == [1.0, 2.0, 0.0, 3.0]


def test_a_series_is_aligned_by_its_index():
    series = pd.Series([1.0, 2.0, 3.0, 4.0], index=INDEX)[::-1]
    assert validate_weights(series, INDEX).tolist() == [1.0, 2.0, 3.0, 4.0]
    assert validate_weights(series.to_frame(), INDEX).tolist() == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, 2.0], r"shape \(2,\) for 4 samples"),
        ([1.0, 2.0, np.nan, 1.0], "1 missing, negative or infinite weights"),
        ([1.0, -2.0, -1.0, 1.0], "2 missing, negative or infinite weights"),
        ([1.0, 2.0, np.inf, 1.0], "infinite"),
        ([0.0] * 4, "weight 0 for every sample"),
    ],
)
def test_invalid_weights_are_refused(weights, message):
    with pytest.raises(DataError, match=message):
        validate_weights(weights, INDEX)


def test_a_series_without_some_samples_is_refused():
    with pytest.raises(DataError, match="1 missing, negative or infinite weights"):
        validate_weights(pd.Series([1.0, 1.0, 1.0], index=INDEX[:3]), INDEX)
