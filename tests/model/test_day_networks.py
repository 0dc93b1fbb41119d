"""Networks of whole days, losses over days, and extra tensors of samples."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from toy_training import ToyDataset, fit_model, make_model, model_weights, same_weights

from qtorch.core.errors import ConfigError
from qtorch.data.dataset.extras import Concepts
from qtorch.metrics.signal import calc_ic
from qtorch.model.loop.module import DayLabel
from qtorch.nn.network import Network

DAYS = {"order": "day", "days_per_batch": 4}


class DemeanedNetwork(Network):
    """Subtract the day's mean from each score, which a network of single samples cannot do."""

    cross_section = True

    def __init__(self, d_feat: int, num_outputs: int = 1) -> None:
        super().__init__(num_outputs)
        self.layer = nn.Linear(d_feat, num_outputs)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        score = self.layer(x[:, :, -1] - 0.5 * x[:, :, -2].roll(-1, -1))
        is_sample = mask[..., None]
        mean = (score * is_sample).sum(1, keepdim=True) / is_sample.sum(1, keepdim=True)
        return self.scores(score - mean)


class SectorNetwork(Network):
    """Add a level per sector and per instrument to the score."""

    extras: ClassVar[tuple[str, ...]] = ("sector", "instrument")

    def __init__(self, d_feat: int, num_sectors: int, num_instruments: int) -> None:
        super().__init__()
        self.layer = nn.Linear(d_feat, 1)
        self.level = nn.Linear(num_sectors, 1)
        self.instrument_level = nn.Embedding(num_instruments, 1)

    def forward(self, x: Tensor, sector: Tensor, instrument: Tensor) -> Tensor:
        return (self.layer(x[:, -1]) + self.level(sector) + self.instrument_level(instrument))[:, 0]


def test_day_network_learns_and_scores_each_sample_once(dataset: ToyDataset) -> None:
    torch.manual_seed(0)
    model = fit_model(dataset, DemeanedNetwork(4), batch=DAYS, epochs=8, loss="ic")
    scores = model.predict(dataset)
    samples = dataset.samples("test")
    assert scores.index.equals(samples.index)
    assert np.allclose(scores.groupby("datetime").mean(), 0, atol=1e-5)
    label = samples.frame(["raw_label"])["raw_label"].iloc[:, 0]
    assert calc_ic(scores, label)[0].mean() > 0.3
    assert model.evals_result_["valid"]["ic"][-1] == pytest.approx(
        -model.evals_result_["valid"]["loss"][-1], abs=2e-3
    )


def test_day_scores_do_not_depend_on_batch_size(dataset: ToyDataset) -> None:
    model = fit_model(dataset, DemeanedNetwork(4), batch=DAYS, epochs=1)
    expected = model.predict(dataset)
    for size in (1, 40, 10_000):
        model.batch = {**model.batch, "eval_size": size}
        pd.testing.assert_series_equal(model.predict(dataset), expected, atol=1e-6)


def test_random_batches_are_refused_for_day_networks_and_losses(dataset: ToyDataset) -> None:
    with pytest.raises(ConfigError, match="order=day"):
        make_model(DemeanedNetwork(4)).fit(dataset)
    with pytest.raises(ConfigError, match="order=day"):
        make_model(loss="rank_ic").fit(dataset)
    with pytest.raises(ConfigError, match="order=day"):
        make_model(day_label={"zscore": True}).fit(dataset)


@pytest.mark.parametrize("loss", ["ic", "rank_ic", "pairwise", "listnet", "listmle"])
def test_day_losses_train_a_network_of_single_samples(dataset: ToyDataset, loss: str) -> None:
    model = fit_model(dataset, loss=loss, batch={"order": "day", "days_per_batch": 2})
    assert all(np.isfinite(model.evals_result_["train"]["loss"]))
    assert len(model.predict(dataset)) == len(dataset.samples("test"))


def test_combined_and_cross_entropy_losses_by_configuration(dataset: ToyDataset) -> None:
    days = {"order": "day", "days_per_batch": 2}
    make_model(loss={"mse": 1.0, "ic": 0.5}, batch=days).fit(dataset)
    model = fit_model(dataset, loss={"_target_": "qtorch.metrics.loss.CrossEntropy", "num_bins": 5})
    assert model.network_.num_outputs == 5
    scores = model.predict(dataset)
    assert scores.abs().max() <= 1
    label = dataset.samples("test").frame(["raw_label"])["raw_label"].iloc[:, 0]
    assert calc_ic(scores, label)[0].mean() > 0
    with pytest.raises(ConfigError, match="mse"):
        make_model(loss={"mze": 1.0}).fit(dataset)
    with pytest.raises(ConfigError, match="not a number"):
        make_model(loss={"mse": "much"}).fit(dataset)
    with pytest.raises(ConfigError, match=r"cannot be part of a sum.*qtorch\.metrics\.DayLoss"):
        make_model(loss={"torch.nn.MSELoss": 1.0}).fit(dataset)
    with pytest.raises(ConfigError, match=r"MSELoss is only called with \(score, target\)"):
        make_model(loss=torch.nn.MSELoss(), batch=days).fit(dataset)


def test_inner_steps_give_bit_identical_results_with_day_batches(dataset: ToyDataset) -> None:
    fits, network = [], DemeanedNetwork(4)
    for inner_steps in (1, 3):
        model = fit_model(dataset, network, batch=DAYS, loss="ic", inner_steps=inner_steps)
        fits.append(model_weights(model))
    assert same_weights(*fits)


class SectorDataset(ToyDataset):
    """A ToyDataset with two sectors: odd and even instruments."""

    def samples(self, segment, *, data_key="infer", purge=False):
        segment_samples = super().samples(segment, data_key=data_key, purge=purge)
        table = pd.DataFrame(
            {"instrument": segment_samples.instruments, "concept": ["odd", "even"] * 15}
        )
        segment_samples.extras["sector"] = Concepts(table).bind(
            segment_samples.calendar, segment_samples.instruments
        )
        return segment_samples


def test_extra_tensors_reach_the_network(dataset: ToyDataset) -> None:
    config = {"_target_": "test_day_networks.SectorNetwork"}
    model = fit_model(SectorDataset(), config, epochs=1)
    assert model.network_config_["num_sectors"] == 2
    assert model.network_config_["num_instruments"] == 30
    assert len(model.predict(SectorDataset()))
    with pytest.raises(ConfigError, match=r"dataset\.extras\.sector"):
        make_model({**config, "num_sectors": 2}, epochs=1).fit(dataset)


def test_day_labels_match_hand_computed_values() -> None:
    label = torch.tensor(
        [[[5.0], [1.0], [9.0], [3.0], [100.0]], [[1.0], [2.0], [3.0], [4.0], [7.0]]]
    )
    mask = torch.tensor([[True] * 4 + [False], [True] * 5])
    labels = DayLabel(drop_extreme=0.5)(label, mask)
    assert torch.equal(labels[0, :, 0].isnan(), torch.tensor([False, True, True, False, True]))
    assert torch.equal(labels[1, :, 0].isnan(), torch.tensor([True, False, False, False, True]))
    zscores = DayLabel(zscore=True)(label, mask)
    first_day = zscores[0, :4, 0]
    assert first_day.mean().item() == pytest.approx(0, abs=1e-6)
    assert first_day.std(correction=0).item() == pytest.approx(1)
    assert torch.isnan(zscores[0, 4, 0])


def test_day_labels_change_training_but_not_validation(dataset: ToyDataset) -> None:
    day_label = {"drop_extreme": 0.2, "zscore": True}
    plain_model, day_label_model = (
        fit_model(dataset, batch=DAYS, day_label=spec) for spec in (None, day_label)
    )
    assert not same_weights(model_weights(plain_model), model_weights(day_label_model))
    assert len(day_label_model.predict(dataset)) == len(plain_model.predict(dataset))
    with pytest.raises(ConfigError, match="drop_extreme"):
        make_model(batch=DAYS, day_label={"drop_extremes": 0.2}).fit(dataset)
