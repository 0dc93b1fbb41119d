"""Networks with a training step of their own: their losses, checkpoints and fine-tuning."""

from __future__ import annotations

import copy
import math

import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from toy_training import ToyDataset, ToyRecorder, make_model, model_weights, same_weights

from qtorch.core.errors import ConfigError, DataError
from qtorch.metrics.loss import MSE
from qtorch.model.lightning_model import LightningModel
from qtorch.model.loop.module import ScoreModule
from qtorch.model.methods.add import UNKNOWN, ADDModule, market_states
from qtorch.model.methods.tabnet import TabNetModule
from qtorch.nn import ADD, TabNet

DAYS = {"order": "day", "days_per_batch": 4}
SMALL_NETWORK = {"hidden_size": 8, "num_layers": 1}


def make_method_model(name: str, module_name: str | None = None, **changes) -> LightningModel:
    """Return a small model of one of the networks, trained by its own module."""
    config = {"_target_": f"qtorch.nn.{name}", **changes.pop("network", SMALL_NETWORK)}
    module_config = {"_target_": f"qtorch.model.{module_name or name + 'Module'}"}
    module_config |= changes.pop("module", {})
    return make_model(config, module=module_config, **changes)


def fit_method_model(
    dataset: ToyDataset, name: str, *, recorder: ToyRecorder | None = None, **changes
) -> LightningModel:
    """Return the model that `make_method_model` makes, after its fit."""
    model = make_method_model(name, **changes)
    model.fit(dataset, recorder=recorder)
    return model


TABNET_ARGUMENTS = {"n_d": 8, "n_a": 4, "out_dim": 8, "n_steps": 2, "vbs": 64}
METHODS = {
    "IGMTF": {"network": {**SMALL_NETWORK, "k_day": 2, "n_neighbor": 3}, "batch": DAYS},
    "TabNet": {
        "network": TABNET_ARGUMENTS,
        "module": {"pretrain_epochs": 1},
        "batch": {"size": 128},
    },
    "ADD": {"network": SMALL_NETWORK, "batch": DAYS, "module": {"gamma": 1.0}},
    "TRA": {
        "network": {**SMALL_NETWORK, "lookback": 4, "router_size": 4},
        "module": {"alpha": 0.5},
    },
    "ADARNN": {"network": SMALL_NETWORK, "module": {"pre_epoch": 1}},
    "TCTS": {"network": SMALL_NETWORK, "module": {"steps": 2}},
}
NUM_LABELS = {"TCTS": 3}
each_method = pytest.mark.parametrize("name", METHODS)


@pytest.fixture
def data(name: str) -> ToyDataset:
    return ToyDataset(num_labels=NUM_LABELS.get(name, 1))


@pytest.mark.slow
@each_method
def test_method_learns_and_scores_each_sample_once(data: ToyDataset, name: str) -> None:
    model = fit_method_model(data, name, epochs=12, **METHODS[name])
    scores = model.predict(data)
    assert scores.index.equals(data.samples("test").index)
    assert max(model.evals_result_["valid"]["ic"]) > 0.3


@pytest.mark.slow
@each_method
def test_resumed_training_ends_with_the_same_weights(name: str, tmp_path) -> None:
    dataset = ToyDataset(40, 16, num_labels=NUM_LABELS.get(name, 1))
    changes = {
        "monitor": "train_loss",
        "checkpoint": {"every_n_steps": 2},
        "trainer": {"max_epochs": 2},
        "inner_steps": 2,
        **METHODS[name],
    }
    reference = fit_method_model(dataset, name, **changes)
    for epoch, step in ((0, 1), (1, 0), (1, 1)):  # TabNet pretrains in epoch 0
        run = tmp_path / f"{epoch}-{step}"
        run.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ScoreModule, "training_step", fail_in_epoch(epoch, step))
            with pytest.raises(RuntimeError, match="killed"):
                fit_method_model(dataset, name, **changes, recorder=ToyRecorder(run))
        resumed_model = fit_method_model(dataset, name, **changes, recorder=ToyRecorder(run))
        assert resumed_model.fit_report_["resumed_from"]
        assert same_weights(model_weights(resumed_model), model_weights(reference))
        assert resumed_model.evals_result_ == reference.evals_result_


def fail_in_epoch(epoch: int, step_number: int):
    """Return a training_step that raises in an epoch before the step of that number."""
    original_step, epochs = ScoreModule.training_step, []

    def failing_step(self, steps):
        epochs.append(self.current_epoch)
        if epochs.count(epoch) > step_number:
            raise RuntimeError("killed")
        original_step(self, steps)

    return failing_step


@each_method
def test_module_refuses_another_network(data: ToyDataset, name: str) -> None:
    changes = {k: v for k, v in METHODS[name].items() if k != "network"}
    with pytest.raises(ConfigError, match=f"trains a {name}"):
        make_method_model("LSTM", f"{name}Module", **changes).fit(data)


@pytest.mark.slow
@each_method
def test_saved_model_predicts_the_same(data: ToyDataset, name: str) -> None:
    model = fit_method_model(data, name, epochs=1, **METHODS[name])
    loaded_model = LightningModel.from_state(model.to_state())
    assert loaded_model.predict(data).equals(model.predict(data))


def test_igmtf_bank_has_the_train_days(dataset: ToyDataset) -> None:
    model = fit_method_model(dataset, "IGMTF", epochs=1, **METHODS["IGMTF"])
    state = model_weights(model)
    samples = dataset.samples("train", data_key="learn")
    assert state["bank_mask"].sum() == len(samples)
    assert len(state["bank_day"]) == samples.num_days
    fewer = fit_method_model(
        dataset, "IGMTF", module={"num_bank_days": 5}, epochs=1, **METHODS["IGMTF"]
    )
    assert len(model_weights(fewer)["bank_day"]) == 5
    assert state["bank_day"].shape[1] == 8


class OptimizerStateCounter(pl.Callback):
    """Record the number of parameters with optimizer state at the start of each epoch."""

    def __init__(self) -> None:
        self.num_states: list[int] = []

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        self.num_states.append(len(trainer.optimizers[0].state))


@pytest.mark.slow
def test_tabnet_pretraining_epochs_do_not_count_for_best_and_early_stop(
    dataset: ToyDataset,
) -> None:
    counter = OptimizerStateCounter()
    model = fit_method_model(
        dataset,
        "TabNet",
        network=TABNET_ARGUMENTS,
        module={"pretrain_epochs": 3},
        epochs=2,
        early_stop=1,
        callbacks=[counter],
    )
    results = model.evals_result_
    for segment in ("train", "valid"):
        losses = results[segment]["pretrain_loss"]
        assert len(losses) == 3
        assert 0.5 < min(losses[1:]) < losses[0]  # the last may be worse, as in any validation
        assert len(results[segment]["loss"]) == 2
    assert model.fit_report_["epochs"] == 5
    assert model.fit_report_["best_epoch"] >= 3
    assert [count > 0 for count in counter.num_states] == [False, True, True, False, True]
    num_epochs = len(results["train"]["loss"])
    model.finetune(dataset, max_epochs=1)
    assert "pretrain_loss" not in model.evals_result_["train"]
    assert len(model.evals_result_["train"]["loss"]) == 1 < num_epochs


def test_tabnet_trains_from_the_best_pretraining_epoch(dataset: ToyDataset) -> None:
    optimizer = {"_target_": "torch.optim.SGD", "lr": 0.0}
    model = make_method_model(
        "TabNet", network=TABNET_ARGUMENTS, module={"pretrain_epochs": 2}, optimizer=optimizer
    )
    weights = []

    class WeightRecorder(pl.Callback):
        def on_validation_end(self, trainer, pl_module) -> None:
            if pl_module.current_epoch == 0:
                weights.append(copy.deepcopy(pl_module.network.state_dict()))
                pl_module.best_pretraining["loss"] = -1.0  # the second epoch counts as worse

        def on_train_epoch_start(self, trainer, pl_module) -> None:
            if pl_module.current_epoch == 2:
                weights.append(copy.deepcopy(pl_module.network.state_dict()))

    model.callbacks = [WeightRecorder()]
    model.fit(dataset)
    # Running statistics change even at a rate of zero; those of the best epoch are restored.
    assert same_weights(*weights)


def test_tabnet_loss_has_the_entropy_of_its_masks() -> None:
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

    (plain, _), ((sparse, weight), entropy) = sums(0.0)[0], sums(0.5)
    torch.testing.assert_close(sparse - plain, 0.5 * entropy * weight)


def test_market_states_are_thirds_of_the_train_days(dataset: ToyDataset) -> None:
    samples = dataset.samples("train", data_key="learn")
    raw = samples.frame(["raw_label"])["raw_label"].iloc[:, 0]
    by_day = raw.groupby(level="datetime").mean()
    expected = pd.qcut(by_day, 3, labels=False)
    states = market_states(samples)
    days = samples.calendar.get_indexer(expected.index)
    assert states[days].tolist() == expected.tolist()
    assert (states[len(days) :] == UNKNOWN).all()
    samples.raw_label = None
    with pytest.raises(DataError, match="raw labels"):
        market_states(samples)


def test_add_loss_is_the_sum_of_its_parts(dataset: ToyDataset) -> None:
    torch.manual_seed(0)
    network = ADD(d_feat=4, **SMALL_NETWORK)
    module = ADDModule(network, MSE(), torch.optim.Adam, mu=0.3)
    samples = dataset.samples("train", data_key="learn")
    module.bind(samples, None)
    batch = samples.day_batch(torch.tensor([3, 8]))
    total, weight = module.training_sums(batch)

    mask, x = batch.mask, batch.x
    label, market = batch.y[mask][:, 0], market_states(samples)[batch.date[mask]]
    score = network(x, mask)[mask]
    outputs = module.disentangler(x, mask, network.encode(x), 0.0)
    expected = (
        F.mse_loss(score, label)
        + F.mse_loss(outputs.adv_excess[mask], label)
        + F.cross_entropy(outputs.market[mask], market)
        + F.cross_entropy(outputs.adv_market[mask], market)
        + 0.3 * F.mse_loss(outputs.reconstruction[mask], x[mask])
    )
    assert weight == len(label)
    torch.testing.assert_close(total / weight, expected)


def test_add_adversaries_grow_stronger_by_epoch(dataset: ToyDataset) -> None:
    alphas = []

    class AlphaRecorder(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module) -> None:
            alphas.append(pl_module.alpha)

    step = {"gamma": 0.5, "gamma_clip": 0.4}
    changes = {"batch": DAYS, "module": step, "callbacks": [AlphaRecorder()]}
    model = fit_method_model(dataset, "ADD", epochs=3, **changes)
    # 2 / (1 + exp(-0.5 p)) - 1 is the hyperbolic tangent of p / 4.
    assert alphas == pytest.approx([0.0, math.tanh(0.25), 0.4])
    assert set(model_weights(model)) == set(ADD(d_feat=4, **SMALL_NETWORK).state_dict())
    model.finetune(dataset, max_epochs=1, layer_decay=0.5)


@pytest.mark.parametrize("name", ["TabNet", "ADD", "ADARNN"])
def test_keep_optimizer_is_refused_if_it_has_auxiliary_parameters(
    data: ToyDataset, name: str
) -> None:
    model = fit_method_model(data, name, epochs=1, **METHODS[name])
    with pytest.raises(ConfigError, match=rf"keep_optimizer: the optimizer of this {name} "):
        model.finetune(data, keep_optimizer=True, max_epochs=1)


def test_keep_optimizer_works_for_tabnet_without_pretraining(dataset: ToyDataset) -> None:
    model = fit_method_model(
        dataset, "TabNet", network=TABNET_ARGUMENTS, module={"pretrain_epochs": 0}, epochs=1
    )
    steps = [float(s["step"]) for s in model.optimizer_state_["state"].values()]
    model.finetune(dataset, keep_optimizer=True, max_epochs=1)
    later_steps = [float(s["step"]) for s in model.optimizer_state_["state"].values()]
    assert later_steps == [2 * step for step in steps]
    model.finetune(dataset, max_epochs=1, layer_decay=0.5)
    with pytest.raises(ConfigError, match="was last trained with layer_decay"):
        model.finetune(dataset, keep_optimizer=True)
