"""Networks that see whole days, losses of days, and what goes with the samples."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from test_training import model_of, same, state_of
from torch import Tensor, nn
from toy_training import ToyDataset

from qtorch.core.errors import ConfigError
from qtorch.data.extras import Concepts
from qtorch.metrics.signal import calc_ic
from qtorch.model.day_label import DayLabel
from qtorch.nn.network import Network

DAYS = {"order": "day", "days_per_batch": 4}


class AgainstTheDay(Network):
    """A score against the day's mean: what a network of single samples cannot give."""

    cross_section = True

    def __init__(self, d_feat: int, num_outputs: int = 1) -> None:
        super().__init__(num_outputs)
        self.layer = nn.Linear(d_feat, num_outputs)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        score = self.layer(x[:, :, -1] - 0.5 * x[:, :, -2].roll(-1, -1))
        known = mask[..., None]
        mean = (score * known).sum(1, keepdim=True) / known.sum(1, keepdim=True)
        return self.scores(score - mean)


class Sector(Network):
    """A score by sector alone."""

    extras: ClassVar[tuple[str, ...]] = ("sector", "instrument")

    def __init__(self, d_feat: int, num_sectors: int, num_instruments: int) -> None:
        super().__init__()
        self.layer = nn.Linear(d_feat, 1)
        self.level = nn.Linear(num_sectors, 1)
        self.own = nn.Embedding(num_instruments, 1)

    def forward(self, x: Tensor, sector: Tensor, instrument: Tensor) -> Tensor:
        return (self.layer(x[:, -1]) + self.level(sector) + self.own(instrument))[:, 0]


def test_a_network_of_whole_days_learns_and_scores_each_sample_once(dataset: ToyDataset) -> None:
    model = model_of(AgainstTheDay(4), batch=DAYS, trainer={"max_epochs": 8}, loss="ic")
    model.fit(dataset)
    scores = model.predict(dataset)
    samples = dataset.samples("test")
    assert scores.index.equals(samples.index)
    assert np.allclose(scores.groupby("datetime").mean(), 0, atol=1e-5)
    label = samples.frame(["raw_label"])["raw_label"].iloc[:, 0]
    assert calc_ic(scores, label)[0].mean() > 0.3
    assert model.evals_result_["valid"]["ic"][-1] == pytest.approx(
        -model.evals_result_["valid"]["loss"][-1], abs=2e-3
    )


def test_days_are_scored_alike_in_any_batch(dataset: ToyDataset) -> None:
    model = model_of(AgainstTheDay(4), batch=DAYS, trainer={"max_epochs": 1})
    model.fit(dataset)
    expected = model.predict(dataset)
    for size in (1, 40, 10_000):
        model.batch = {**model.batch, "eval_size": size}
        pd.testing.assert_series_equal(model.predict(dataset), expected, atol=1e-6)


def test_random_batches_for_a_network_or_a_loss_of_days_are_refused(dataset: ToyDataset) -> None:
    with pytest.raises(ConfigError, match="order=day"):
        model_of(AgainstTheDay(4)).fit(dataset)
    with pytest.raises((ConfigError, ValueError), match="order=day"):
        model_of(loss="rank_ic").fit(dataset)
    with pytest.raises(ConfigError, match="order=day"):
        model_of(day_label={"zscore": True}).fit(dataset)


@pytest.mark.parametrize("loss", ["ic", "rank_ic", "pairwise", "listnet", "listmle"])
def test_losses_of_days_train_a_network_of_samples(dataset: ToyDataset, loss: str) -> None:
    model = model_of(loss=loss, batch={"order": "day", "days_per_batch": 2})
    model.fit(dataset)
    assert all(np.isfinite(model.evals_result_["train"]["loss"]))
    assert len(model.predict(dataset)) == len(dataset.samples("test"))


def test_a_sum_of_losses_and_bins_by_configuration(dataset: ToyDataset) -> None:
    days = {"order": "day", "days_per_batch": 2}
    model_of(loss={"mse": 1.0, "ic": 0.5}, batch=days).fit(dataset)
    model = model_of(loss={"_target_": "qtorch.metrics.loss.CrossEntropy", "num_bins": 5})
    model.fit(dataset)
    assert model.network_.num_outputs == 5
    scores = model.predict(dataset)
    assert scores.abs().max() <= 1
    label = dataset.samples("test").frame(["raw_label"])["raw_label"].iloc[:, 0]
    assert calc_ic(scores, label)[0].mean() > 0
    with pytest.raises(ConfigError, match="mse"):
        model_of(loss={"mze": 1.0}).fit(dataset)
    with pytest.raises(ConfigError, match="not a number"):
        model_of(loss={"mse": "much"}).fit(dataset)


def test_inner_steps_do_not_change_a_bit_of_days(dataset: ToyDataset) -> None:
    fits, network = [], AgainstTheDay(4)
    for inner_steps in (1, 3):
        model = model_of(network, batch=DAYS, loss="ic", inner_steps=inner_steps)
        model.fit(dataset)
        fits.append(state_of(model))
    assert same(*fits)


class WithSectors(ToyDataset):
    """Odd instruments are of the one sector, even ones of the other."""

    def samples(self, segment, *, data_key="infer", purge=False):
        found = super().samples(segment, data_key=data_key, purge=purge)
        table = pd.DataFrame({"instrument": found.instruments, "concept": ["odd", "even"] * 15})
        found.extras["sector"] = Concepts(table).bind(found.calendar, found.instruments)
        return found


def test_what_goes_with_a_sample_reaches_the_network(dataset: ToyDataset) -> None:
    config = {"_target_": "test_day_networks.Sector"}
    model = model_of(config, trainer={"max_epochs": 1})
    model.fit(WithSectors())
    assert model.network_config_["num_sectors"] == 2
    assert model.network_config_["num_instruments"] == 30
    assert len(model.predict(WithSectors()))
    with pytest.raises(ConfigError, match=r"dataset\.extras\.sector"):
        model_of({**config, "num_sectors": 2}, trainer={"max_epochs": 1}).fit(dataset)


def test_day_labels_by_hand() -> None:
    label = torch.tensor(
        [[[5.0], [1.0], [9.0], [3.0], [100.0]], [[1.0], [2.0], [3.0], [4.0], [7.0]]]
    )
    mask = torch.tensor([[True] * 4 + [False], [True] * 5])
    found = DayLabel(drop_extreme=0.5)(label, mask)
    assert torch.equal(found[0, :, 0].isnan(), torch.tensor([False, True, True, False, True]))
    assert torch.equal(found[1, :, 0].isnan(), torch.tensor([True, False, False, False, True]))
    scaled = DayLabel(zscore=True)(label, mask)
    known = scaled[0, :4, 0]
    assert known.mean().item() == pytest.approx(0, abs=1e-6)
    assert known.std(correction=0).item() == pytest.approx(1)
    assert torch.isnan(scaled[0, 4, 0])


def test_day_labels_change_what_is_learnt_and_not_what_is_judged(dataset: ToyDataset) -> None:
    plain = model_of(batch=DAYS)
    treated = model_of(batch=DAYS, day_label={"drop_extreme": 0.2, "zscore": True})
    for model in (plain, treated):
        model.fit(dataset)
    assert not same(state_of(plain), state_of(treated))
    assert len(treated.predict(dataset)) == len(plain.predict(dataset))
    with pytest.raises(ConfigError, match="drop_extreme"):
        model_of(batch=DAYS, day_label={"drop_extremes": 0.2}).fit(dataset)
