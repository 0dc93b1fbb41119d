"""NaN and infinite weights and scores are an error, unless the user allows them."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from toy_training import NUM_FEATURES, ToyDataset, fit_model, make_model

from qtorch.core.errors import DataError
from qtorch.model.base import Model
from qtorch.model.nonfinite import describe_nonfinite
from qtorch.record.signal import predict_frame


@pytest.fixture(scope="module")
def model(dataset: ToyDataset) -> Model:
    return fit_model(dataset, epochs=1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_prediction_with_nonfinite_weights_raises(
    dataset: ToyDataset, model: Model, value: float
) -> None:
    weight = next(model.network_.parameters())
    original_weight = weight.detach().clone()
    name = next(iter(model.network_.state_dict()))
    count = sum(p.numel() for p in model.network_.parameters())
    with torch.no_grad():
        weight.view(-1)[:2] = value
    try:
        message = rf"2 of {count} weights of the MLP are NaN or infinite, the first in '{name}'"
        with pytest.raises(DataError, match=f"{message}.*allow_nonfinite"):
            model.predict(dataset)
        model.allow_nonfinite = True
        assert not np.isfinite(model.predict(dataset)).all()
    finally:
        model.allow_nonfinite = False
        with torch.no_grad():
            weight.copy_(original_weight)


def test_nonfinite_scores_are_counted_by_day(
    model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = ToyDataset()
    samples = dataset.samples("test")
    day, name = samples.index[40]
    days = samples.index.get_level_values("datetime").unique()
    row = dataset.view.calendar.get_loc(day), list(dataset.view.instruments).index(name), 0
    dataset.view.groups["feature"]._panel.values[row] = torch.nan
    with pytest.raises(DataError) as error:
        model.predict(dataset)
    bad = ~np.isfinite(_predict_anyway(model, dataset))
    num_days = bad[bad].index.get_level_values("datetime").nunique()
    assert 1 <= num_days <= dataset.step_len
    description = (
        f"{bad.sum()} of {len(samples)} scores are NaN or infinite, on {num_days} of {len(days)} "
        f"days, the first of which is {day:%Y-%m-%d}"
    )
    assert str(error.value).startswith(f"{description}. ")
    assert "Fillna" in str(error.value)
    model.allow_nonfinite = True
    with caplog.at_level(logging.WARNING, logger="qtorch"):
        frame = predict_frame(model, dataset)
    model.allow_nonfinite = False
    assert description in caplog.text
    assert describe_nonfinite(frame.dropna().clip(-1, 1)) is None


def _predict_anyway(model: Model, dataset: ToyDataset):
    model.allow_nonfinite = True
    try:
        return model.predict(dataset)
    finally:
        model.allow_nonfinite = False


class ExplodesAtTheEnd(torch.nn.Module):
    """A linear network with a weight that its score does not depend on, NaN after some updates."""

    inputs = "flat"

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3 * NUM_FEATURES, 1)
        self.unused = torch.nn.Parameter(torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.unused[0] = torch.nan
        return self.linear(x)[:, 0]


def test_training_that_ends_with_nonfinite_weights_raises(dataset: ToyDataset) -> None:
    model = make_model(ExplodesAtTheEnd(), epochs=1)
    with pytest.raises(DataError, match=r"1 of 16 weights of the ExplodesAtTheEnd.*gradient_clip"):
        model.fit(dataset)
    assert model.network_ is None
    model = fit_model(dataset, ExplodesAtTheEnd(), epochs=1, allow_nonfinite=True)
    assert np.isfinite(model.predict(dataset)).all()
