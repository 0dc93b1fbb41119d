"""Networks with a training step of their own: what the step learns by, and that it goes on."""

from __future__ import annotations

import math

import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from test_training import model_of, same, state_of
from toy_training import ToyDataset, ToyRecorder

from qtorch.core.errors import ConfigError, DataError
from qtorch.metrics.loss import MSE
from qtorch.model.add_module import UNKNOWN, ADDModule, market_states
from qtorch.model.lightning_model import LightningModel
from qtorch.model.module import ScoreModule
from qtorch.model.tabnet_module import TabNetModule
from qtorch.nn import ADD, TabNet

DAYS = {"order": "day", "days_per_batch": 4}
SMALL = {"hidden_size": 8, "num_layers": 1}


def own(name: str, by: str | None = None, **changes) -> LightningModel:
    """A small one of our networks, trained by its module."""
    config = {"_target_": f"qtorch.nn.{name}", **changes.pop("network", SMALL)}
    step = {"_target_": f"qtorch.model.{by or name + 'Module'}"}
    step |= changes.pop("module", {})
    return model_of(config, module=step, **changes)


PICKS = {"n_d": 8, "n_a": 4, "out_dim": 8, "n_steps": 2, "vbs": 64}
STEPS = {
    "IGMTF": {"network": {**SMALL, "k_day": 2, "n_neighbor": 3}, "batch": DAYS},
    "TabNet": {"network": PICKS, "module": {"pretrain_epochs": 1}, "batch": {"size": 128}},
    "ADD": {"network": SMALL, "batch": DAYS, "module": {"gamma": 1.0}},
    "TRA": {"network": {**SMALL, "lookback": 4, "router_size": 4}, "module": {"alpha": 0.5}},
    "ADARNN": {"network": SMALL, "module": {"pre_epoch": 1}},
    "TCTS": {"network": SMALL, "module": {"steps": 2}},
}
LABELS = {"TCTS": 3}
every = pytest.mark.parametrize("name", STEPS)


@pytest.fixture
def data(name: str) -> ToyDataset:
    return ToyDataset(num_labels=LABELS.get(name, 1))


@pytest.mark.slow
@every
def test_it_learns_and_scores_each_sample_once(data: ToyDataset, name: str) -> None:
    model = own(name, trainer={"max_epochs": 12}, **STEPS[name])
    model.fit(data)
    scores = model.predict(data)
    assert scores.index.equals(data.samples("test").index)
    assert max(model.evals_result_["valid"]["ic"]) > 0.3


@pytest.mark.slow
@every
def test_a_resumed_training_ends_with_the_same_weights(name: str, tmp_path) -> None:
    dataset = ToyDataset(40, 16, num_labels=LABELS.get(name, 1))
    changes = {
        "monitor": "train_loss",
        "checkpoint": {"every_n_steps": 2},
        "trainer": {"max_epochs": 2},
        "inner_steps": 2,
        **STEPS[name],
    }
    whole = own(name, **changes)
    whole.fit(dataset)
    for epoch, number in ((0, 1), (1, 0), (1, 1)):  # TabNet pretrains in epoch 0
        run = tmp_path / f"{epoch}-{number}"
        run.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ScoreModule, "training_step", killed_at(epoch, number))
            with pytest.raises(RuntimeError, match="killed"):
                own(name, **changes).fit(dataset, recorder=ToyRecorder(run))
        again = own(name, **changes)
        again.fit(dataset, recorder=ToyRecorder(run))
        assert again.fit_report_["resumed_from"]
        assert same(state_of(again), state_of(whole))
        assert again.evals_result_ == whole.evals_result_


def killed_at(epoch: int, number: int):
    """A training_step that raises in an epoch before its step of that number."""
    step, seen = ScoreModule.training_step, []

    def killed(self, steps):
        seen.append(self.current_epoch)
        if seen.count(epoch) > number:
            raise RuntimeError("killed")
        step(self, steps)

    return killed


@every
def test_the_module_refuses_another_network(data: ToyDataset, name: str) -> None:
    changes = {k: v for k, v in STEPS[name].items() if k != "network"}
    with pytest.raises(ConfigError, match=f"trains a {name}"):
        own("LSTM", f"{name}Module", **changes).fit(data)


@pytest.mark.slow
@every
def test_a_saved_model_predicts_the_same(data: ToyDataset, name: str) -> None:
    model = own(name, trainer={"max_epochs": 1}, **STEPS[name])
    model.fit(data)
    again = LightningModel.from_state(model.to_state())
    assert again.predict(data).equals(model.predict(data))


def test_the_bank_of_igmtf_holds_the_train_days(dataset: ToyDataset) -> None:
    model = own("IGMTF", trainer={"max_epochs": 1}, **STEPS["IGMTF"])
    model.fit(dataset)
    state = state_of(model)
    samples = dataset.samples("train", data_key="learn")
    assert state["bank_mask"].sum() == len(samples)
    assert len(state["bank_day"]) == samples.num_days
    fewer = own("IGMTF", module={"num_bank_days": 5}, trainer={"max_epochs": 1}, **STEPS["IGMTF"])
    fewer.fit(dataset)
    assert len(state_of(fewer)["bank_day"]) == 5
    torch.testing.assert_close(state["bank_day"].shape[1], 8)


class Optimizers(pl.Callback):
    """Notes how many parameters the optimizer knows as each epoch begins."""

    def __init__(self) -> None:
        self.known: list[int] = []

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        self.known.append(len(trainer.optimizers[0].state))


@pytest.mark.slow
def test_tabnet_pretrains_without_being_judged_and_then_learns(dataset: ToyDataset) -> None:
    noted = Optimizers()
    model = own(
        "TabNet",
        network=PICKS,
        module={"pretrain_epochs": 3},
        trainer={"max_epochs": 2},
        early_stop=1,
        callbacks=[noted],
    )
    model.fit(dataset)
    told = model.evals_result_
    for segment in ("train", "valid"):
        guessed = told[segment]["pretrain_loss"]
        assert len(guessed) == 3
        assert 0.5 < guessed[-1] < guessed[0]
        assert len(told[segment]["loss"]) == 2
    assert model.fit_report_["epochs"] == 5
    assert model.fit_report_["best_epoch"] >= 3
    assert noted.known[0] == noted.known[3] == 0 < min(noted.known[1], noted.known[4])
    before = len(told["train"]["loss"])
    model.finetune(dataset, max_epochs=1)
    assert "pretrain_loss" not in model.evals_result_["train"]
    assert len(model.evals_result_["train"]["loss"]) == 1 < before


def test_tabnet_goes_on_from_the_best_pretraining_epoch(dataset: ToyDataset) -> None:
    rates = {"_target_": "torch.optim.SGD", "lr": 0.0}
    model = own("TabNet", network=PICKS, module={"pretrain_epochs": 2}, optimizer=rates)
    found = []

    class Losses(pl.Callback):
        def on_validation_end(self, trainer, pl_module) -> None:
            if pl_module.pretrains:  # as if the second epoch were worse
                told = 1.0 + pl_module.current_epoch
                if told == 1.0:
                    found.append({k: v.clone() for k, v in pl_module.network.state_dict().items()})
                    pl_module.best_pretrained["loss"] = -1.0

        def on_train_epoch_start(self, trainer, pl_module) -> None:
            if pl_module.current_epoch == 2:
                found.append({k: v.clone() for k, v in pl_module.network.state_dict().items()})

    model.callbacks = [Losses()]
    model.fit(dataset)
    # Running statistics move even at a rate of zero; those of the best epoch came back.
    assert same(*found)


def test_the_sparser_the_less_tabnets_loss() -> None:
    def sums(lambda_sparse: float) -> torch.Tensor:
        torch.manual_seed(0)
        network = TabNet(d_feat=6, n_d=4, n_a=4, out_dim=4, n_steps=3, vbs=8)
        module = TabNetModule(network, MSE(), torch.optim.Adam, lambda_sparse=lambda_sparse)
        module.pretraining_epochs = 0
        batch = ToyDataset(12, 8, step_len=1).samples("train").day_batch(torch.arange(3))
        batch.x = batch.x.repeat(1, 1, 1, 2)[..., :6]
        return torch.stack([torch.as_tensor(v) for v in module.training_sums(batch)]), (
            network.encode(batch.x.flatten(0, 1)[:, 0])[1][batch.mask.flatten()].mean()
        )

    (plain, _), ((sparse, share), entropy) = sums(0.0)[0], sums(0.5)
    torch.testing.assert_close(sparse - plain, 0.5 * entropy * share)


def test_the_markets_states_are_thirds_of_the_train_days(dataset: ToyDataset) -> None:
    samples = dataset.samples("train", data_key="learn")
    raw = samples.frame(["raw_label"])["raw_label"].iloc[:, 0]
    by_day = raw.groupby(level="datetime").mean()
    expected = pd.qcut(by_day, 3, labels=False)
    found = market_states(samples)
    days = samples.calendar.get_indexer(expected.index)
    assert found[days].tolist() == expected.tolist()
    assert (found[len(days) :] == UNKNOWN).all()
    samples.raw_label = None
    with pytest.raises(DataError, match="raw labels"):
        market_states(samples)


def test_adds_loss_is_the_sum_of_its_parts(dataset: ToyDataset) -> None:
    torch.manual_seed(0)
    network = ADD(d_feat=4, **SMALL)
    module = ADDModule(network, MSE(), torch.optim.Adam, mu=0.3)
    samples = dataset.samples("train", data_key="learn")
    module.bind(samples, None)
    batch = samples.day_batch(torch.tensor([3, 8]))
    total, share = module.training_sums(batch)

    mask, x = batch.mask, batch.x
    label, market = batch.y[mask][:, 0], market_states(samples)[batch.date[mask]]
    score = network(x, mask)[mask]
    taught = module.disentangler(x, mask, network.encode(x), 0.0)
    expected = (
        F.mse_loss(score, label)
        + F.mse_loss(taught.adv_excess[mask], label)
        + F.cross_entropy(taught.market[mask], market)
        + F.cross_entropy(taught.adv_market[mask], market)
        + 0.3 * F.mse_loss(taught.rebuilt[mask], x[mask])
    )
    assert share == len(label)
    torch.testing.assert_close(total / share, expected)


def test_adds_adversaries_grow_stronger_by_the_epoch(dataset: ToyDataset) -> None:
    seen = []

    class Alpha(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module) -> None:
            seen.append(pl_module.alpha)

    step = {"gamma": 0.5, "gamma_clip": 0.4}
    changes = {"batch": DAYS, "module": step, "callbacks": [Alpha()]}
    model = own("ADD", trainer={"max_epochs": 3}, **changes)
    model.fit(dataset)
    # 2 / (1 + exp(-0.5 p)) - 1 is the hyperbolic tangent of p / 4.
    assert seen == pytest.approx([0.0, math.tanh(0.25), 0.4])
    assert set(state_of(model)) == set(ADD(d_feat=4, **SMALL).state_dict())
    model.finetune(dataset, max_epochs=1, layer_decay=0.5)


@pytest.mark.parametrize("name", ["TabNet", "ADD", "ADARNN"])
def test_an_optimizer_that_moved_more_than_the_network_is_not_kept(
    data: ToyDataset, name: str
) -> None:
    model = own(name, trainer={"max_epochs": 1}, **STEPS[name])
    model.fit(data)
    with pytest.raises(ConfigError, match=rf"keep_optimizer: the optimizer of this {name} "):
        model.finetune(data, keep_optimizer=True, max_epochs=1)


def test_tabnets_optimizer_is_kept_where_nothing_else_learnt(dataset: ToyDataset) -> None:
    model = own("TabNet", network=PICKS, module={"pretrain_epochs": 0}, trainer={"max_epochs": 1})
    model.fit(dataset)
    steps = [float(s["step"]) for s in model.optimizer_state_["state"].values()]
    model.finetune(dataset, keep_optimizer=True, max_epochs=1)
    more = [float(s["step"]) for s in model.optimizer_state_["state"].values()]
    assert more == [2 * step for step in steps]
    model.finetune(dataset, max_epochs=1, layer_decay=0.5)
    with pytest.raises(ConfigError, match="was last trained with layer_decay"):
        model.finetune(dataset, keep_optimizer=True)
