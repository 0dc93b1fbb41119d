"""Tests of losses that are a user's own functions and modules."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from torch import nn
from toy_training import fit_model, make_model

from qtorch.core.errors import ConfigError
from qtorch.data.dataset.reweighter import Reweighter
from qtorch.metrics.loss import FunctionLoss
from qtorch.model.loop.factories import build_loss

DAYS = {"order": "day", "days_per_batch": 2}


def masked_error(score, target, mask):
    return ((score - target) ** 2 * mask).sum() / mask.sum().clamp(min=1)


def power_error(score, target, weight, power=2):
    return (weight * (score - target).abs() ** power).sum() / weight.sum().clamp(min=1e-9)


def make_power_error(power=2, name="error"):
    return lambda score, target, weight: power_error(score, target, weight, power)


class WeightedError(nn.Module):
    def forward(self, score, target, weight=None):
        return (weight * (score - target) ** 2).sum() / weight.sum().clamp(min=1e-9)


class BothError(nn.Module):
    def forward(self, score, target, *, mask, weight):
        return WeightedError()(score, target, weight * mask)


class RisingWeights(Reweighter):
    def reweight(self, data):
        return pd.Series(np.linspace(0.1, 2.0, len(data)), index=data.index)


OWN_LOSSES = [masked_error, WeightedError(), WeightedError, BothError()]


@pytest.mark.parametrize("loss", OWN_LOSSES, ids=["mask", "weight", "class", "both"])
@pytest.mark.parametrize("batch", [{}, DAYS], ids=["samples", "days"])
def test_own_mean_squared_error_equals_ours(dataset, loss, batch):
    expected = fit_model(dataset, loss="mse", batch=batch)
    model = fit_model(dataset, loss=loss, batch=batch)
    pd.testing.assert_series_equal(model.predict(dataset), expected.predict(dataset), atol=1e-5)
    for segment in ("train", "valid"):
        losses = model.evals_result_[segment]["loss"]
        assert losses == pytest.approx(expected.evals_result_[segment]["loss"], rel=1e-5)


@pytest.mark.parametrize("loss", OWN_LOSSES[1:], ids=["weight", "class", "both"])
def test_own_loss_takes_the_weights_of_a_reweighter(dataset, loss):
    expected = fit_model(dataset, loss="mse", reweighter=RisingWeights())
    model = fit_model(dataset, loss=loss, reweighter=RisingWeights())
    unweighted_model = fit_model(dataset, loss="mse")
    scores = model.predict(dataset)
    pd.testing.assert_series_equal(scores, expected.predict(dataset), atol=1e-5)
    assert not np.allclose(scores, unweighted_model.predict(dataset), atol=1e-3)


@pytest.mark.parametrize(
    "loss",
    [
        f"{__name__}.power_error",
        {"_target_": f"{__name__}.power_error", "power": 2},
        {"func": "power_error", "module_path": __name__},
        {"_target_": f"{__name__}.power_error", "_partial_": True},
        f"{__name__}.make_power_error",
        {"_target_": f"{__name__}.make_power_error", "_args_": [2]},
        {f"{__name__}.power_error": 1.0},
        "torch.nn.functional.mse_loss",
        {"_target_": "torch.nn.functional.mse_loss", "reduction": "mean"},
    ],
)
def test_a_function_is_a_loss_by_its_name_too(dataset, loss):
    expected = fit_model(dataset, loss="mse").evals_result_["train"]["loss"]
    assert fit_model(dataset, loss=loss).evals_result_["train"]["loss"] == pytest.approx(expected)


def test_wrong_arguments_of_a_named_function_are_refused():
    with pytest.raises(ConfigError, match="powr"):
        build_loss({"_target_": f"{__name__}.power_error", "powr": 3})


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda score, target: 0.5, "returns a float; expected a tensor"),
        (lambda score, target: (score - target) ** 2, r"shape \[8\]; expected the mean"),
        (lambda score, target: (score - target).detach().mean(), "without a gradient"),
        (lambda score, target, weight: weight.mean(), "without a gradient"),
        (nn.MSELoss(reduction="none"), r"the loss MSELoss returns a tensor of shape \[8\]"),
    ],
)
def test_what_a_loss_returns_is_checked_before_data_are_read(loss, message):
    with pytest.raises(ConfigError, match=message):
        build_loss(loss)


def test_a_loss_that_needs_whole_days_is_not_refused():
    def day_loss(score, target):
        days, instruments = score.shape
        return (score - target).square().sum() / (days * instruments)

    assert build_loss(day_loss) is day_loss


def test_own_loss_in_a_sum(dataset):
    spec = {"own": {"loss": WeightedError(), "weight": 0.5}, "mse": 0.5}
    expected = fit_model(dataset, loss="mse", batch=DAYS)
    model = fit_model(dataset, loss=spec, batch=DAYS)
    pd.testing.assert_series_equal(model.predict(dataset), expected.predict(dataset), atol=1e-5)


def test_loss_without_weights_refuses_a_reweighter(dataset):
    with pytest.raises(ConfigError, match="masked_error takes none: give it an argument `weight`"):
        make_model(loss=masked_error).fit(dataset, reweighter=RisingWeights())


def test_arguments_of_torch_losses_are_their_own():
    """In torch, `weight` belongs to classes or is no weight of a mean."""
    for loss in (nn.functional.mse_loss, nn.functional.cross_entropy, nn.MSELoss()):
        assert build_loss(loss) is loss
    assert isinstance(build_loss("torch.nn.MSELoss"), nn.MSELoss)
    assert isinstance(build_loss(nn.MSELoss), nn.MSELoss)
    assert isinstance(build_loss(masked_error), FunctionLoss)


@pytest.mark.parametrize(
    "loss",
    [
        nn.ReLU(),
        {"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 1},
        lambda score: score.mean(),
        lambda score, target, day: score.mean(),
    ],
)
def test_what_is_no_loss_is_refused_before_training(loss):
    with pytest.raises(ConfigError, match=r"cannot be called with \(score, target\)"):
        build_loss(loss)
