"""The numbers of a training: against a loop written by hand, whatever Lightning's steps hold."""

from __future__ import annotations

import copy

import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from toy_training import ToyDataset, ToyRecorder

from qtorch.core.errors import ConfigError
from qtorch.data.batches import BatchLoader
from qtorch.data.reweighter import Reweighter
from qtorch.metrics.loss import MSE
from qtorch.metrics.signal import calc_ic
from qtorch.model.lightning_model import LightningModel
from qtorch.model.module import ScoreModule
from qtorch.nn import LSTM, MLP

ADAM = {"_target_": "torch.optim.Adam", "lr": 0.01}


def model_of(network=None, **changes) -> LightningModel:
    trainer = {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False}
    trainer |= changes.pop("trainer", {})
    arguments = {
        "network": network or {"_target_": "qtorch.nn.MLP", "layers": [8], "dropout": 0.0},
        "optimizer": ADAM,
        "batch": {"size": 64},
        "checkpoint": {"enabled": False},
        "seed": 3,
    }
    return LightningModel(**{**arguments, **changes}, trainer=trainer)


def state_of(model: LightningModel) -> dict[str, torch.Tensor]:
    return model.network_.state_dict()


def same(first: dict, second: dict) -> bool:
    return all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (3, 0.1)])
def test_equal_to_a_loop_by_hand(dataset: ToyDataset, accumulate: int, clip: float | None) -> None:
    trainer = {"accumulate_grad_batches": accumulate, "gradient_clip_val": clip}
    # "train/loss" goes down in both epochs, so that the best weights are the last ones.
    model = model_of(trainer=trainer, monitor="train_loss")
    model.fit(dataset)

    samples = dataset.samples("train", data_key="learn")
    torch.manual_seed(3)
    network = MLP(d_feat=12, layers=[8], dropout=0.0)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    loader = BatchLoader(samples, batch_size=64, seed=3)
    for epoch in range(2):
        total = count = 0.0
        for number, batch in enumerate(loader.batches(epoch), 1):
            x = batch.x.transpose(1, 2).flatten(1)
            loss = (network(x) - batch.y[:, 0]).square().mean()
            (loss / accumulate).backward()
            total += loss.item() * len(x)
            count += len(x)
            if number % accumulate == 0 or number == len(loader):
                if clip is not None:
                    torch.nn.utils.clip_grad_norm_(network.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
        assert model.evals_result_["train"]["loss"][epoch] == pytest.approx(total / count, rel=1e-5)
    for key, value in network.state_dict().items():
        torch.testing.assert_close(state_of(model)[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_inner_steps_do_not_change_a_bit(dataset: ToyDataset, precision: str) -> None:
    fits = []
    for inner_steps in (1, 3, "auto"):
        model = model_of(
            {"_target_": "qtorch.nn.GRU", "hidden_size": 8, "dropout": 0.3},
            scheduler={
                "scheduler": {"_target_": "torch.optim.lr_scheduler.ExponentialLR", "gamma": 0.9},
                "interval": "step",
                "frequency": 2,
            },
            trainer={
                "accumulate_grad_batches": 2,
                "gradient_clip_val": 0.5,
                "gradient_clip_algorithm": "value",
                "precision": precision,
            },
            inner_steps=inner_steps,
        )
        model.fit(dataset)
        fits.append(model)
    assert fits[2].fit_report_["inner_steps"] > 3
    for other in fits[1:]:
        assert same(state_of(fits[0]), state_of(other))
        assert fits[0].evals_result_ == other.evals_result_


class _Watcher(pl.Callback):
    def __init__(self) -> None:
        self.seen = 0

    def on_after_backward(self, trainer, pl_module) -> None:
        self.seen += 1
        assert all(p.grad is not None for p in pl_module.parameters())


def test_a_callback_between_backward_and_step_is_called_and_changes_nothing(
    dataset: ToyDataset,
) -> None:
    watcher = _Watcher()
    watched, bare = model_of(callbacks=[watcher]), model_of()
    watched.fit(dataset)
    bare.fit(dataset)
    assert watched.fit_report_["inner_steps"] == 1
    assert watcher.seen == 2 * 16
    assert same(state_of(watched), state_of(bare))
    again = model_of(callbacks=[watcher], inner_steps=5)
    again.fit(dataset)
    assert watcher.seen == 4 * 16
    assert same(state_of(again), state_of(bare))


def test_validation_figures_are_those_of_the_scores(
    dataset: ToyDataset, recorder: ToyRecorder
) -> None:
    model = model_of(trainer={"max_epochs": 1})
    model.fit(dataset, recorder=recorder)
    samples = dataset.samples("valid", data_key="learn")
    pred = model.predict(dataset, "valid").reindex(samples.index)
    raw = pd.Series(samples.raw_label[:, 0].numpy(), index=samples.index)
    label = pd.Series(samples.target[:, 0].numpy(), index=samples.index)
    valid = {k: v[0] for k, v in model.evals_result_["valid"].items()}
    ic, rank_ic = (series.mean() for series in calc_ic(pred, raw))
    assert valid["ic"] == pytest.approx(ic, abs=1e-6)
    assert valid["rank_ic"] == pytest.approx(rank_ic, abs=1e-6)
    assert valid["loss"] == pytest.approx(((pred - label) ** 2).mean(), rel=1e-5)
    assert recorder.history() == {
        ("train/loss", 0): model.evals_result_["train"]["loss"][0],
        ("lr", 0): 0.01,
        **{(f"valid/{k}", 0): v for k, v in valid.items()},
    }


class _FirstHalf(Reweighter):
    def reweight(self, data: pd.DataFrame) -> pd.Series:
        weight = pd.Series(2.0, index=data.index)
        weight.iloc[len(data) // 2 :] = 0.0
        return weight


def test_weights_decide_what_is_learnt_and_told(dataset: ToyDataset) -> None:
    still = {"_target_": "torch.optim.SGD", "lr": 0.0}
    model = model_of(optimizer=still, trainer={"max_epochs": 1})
    model.fit(dataset, _FirstHalf())
    samples = dataset.samples("train", data_key="learn")
    pred = model.predict(dataset, "train").to_numpy()
    half = len(samples) // 2
    expected = ((pred - samples.target[:, 0].numpy())[:half] ** 2).mean()
    # The running statistics of the batch normalisation have moved, the training's have not.
    assert model.evals_result_["train"]["loss"][0] == pytest.approx(expected, rel=0.2)
    learnt = model_of()
    learnt.fit(dataset, _FirstHalf())
    unweighted = model_of()
    unweighted.fit(dataset)
    assert not same(state_of(learnt), state_of(unweighted))


def test_the_weighted_loss_of_an_epoch_is_exact(dataset: ToyDataset) -> None:
    still = {"_target_": "torch.optim.SGD", "lr": 0.0}
    network = {"_target_": "qtorch.nn.LSTM", "hidden_size": 4, "num_layers": 1}
    model = model_of(network, optimizer=still, trainer={"max_epochs": 1})
    model.fit(dataset, _FirstHalf())
    samples = dataset.samples("train", data_key="learn")
    pred = model.predict(dataset, "train").to_numpy()
    half = len(samples) // 2
    expected = ((pred - samples.target[:, 0].numpy())[:half] ** 2).mean()
    assert model.evals_result_["train"]["loss"][0] == pytest.approx(expected, rel=1e-5)


def test_the_step_is_a_pure_function_of_parameters_and_batch(dataset: ToyDataset) -> None:
    network = LSTM(d_feat=4, hidden_size=4)
    module = ScoreModule(network, MSE(), torch.optim.Adam)
    batch = dataset.samples("train", data_key="learn").batch(torch.arange(10))
    total, share, _ = module.loss_sums(batch)
    (total / share).backward()
    state = {k: v.detach().clone() for k, v in network.named_parameters()}

    def loss(state):
        total, share, _ = module.loss_sums(batch, state)
        return total / share

    gradients = torch.func.grad(loss)(state)
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)


def test_the_best_epochs_weights_stay(dataset: ToyDataset) -> None:
    growing = {"_target_": "torch.optim.SGD", "lr": 0.05}
    worse = {
        "_target_": "torch.optim.lr_scheduler.LambdaLR",
        "lr_lambda": lambda epoch: 1.0 if epoch == 0 else 40.0,
    }
    model = model_of(optimizer=growing, scheduler=worse, trainer={"max_epochs": 3})
    model.fit(dataset)
    losses = model.evals_result_["valid"]["loss"]
    assert min(losses) == losses[0]
    first = model_of(optimizer=growing, trainer={"max_epochs": 1})
    first.fit(dataset)
    assert same(state_of(model), state_of(first))
    assert model.fit_report_["best_epoch"] == 0
    assert model.fit_report_["best_value"] == losses[0]


def test_early_stop_on_each_monitor(dataset: ToyDataset) -> None:
    still = {"_target_": "torch.optim.SGD", "lr": 0.0}
    network = {"_target_": "qtorch.nn.LSTM", "hidden_size": 4}
    for spec in (2, {"monitor": "ic", "patience": 2}, {"monitor": "rank_ic", "patience": 2}):
        model = model_of(network, optimizer=still, early_stop=spec, trainer={"max_epochs": 9})
        model.fit(dataset)
        assert model.fit_report_["epochs"] == 3, spec


def test_plateau_scheduler_gets_the_monitored_metric(dataset: ToyDataset) -> None:
    model = model_of(
        {"_target_": "qtorch.nn.LSTM", "hidden_size": 4},
        optimizer={"_target_": "torch.optim.SGD", "lr": 1e-12},
        scheduler={
            "scheduler": {
                "_target_": "torch.optim.lr_scheduler.ReduceLROnPlateau",
                "mode": "max",
                "factor": 0.5,
                "patience": 0,
                "threshold": 0.1,
            },
            "monitor": "rank_ic",
        },
        trainer={"max_epochs": 3},
    )
    model.fit(dataset)
    assert model.evals_result_["train"]["lr"] == pytest.approx([1e-12, 1e-12, 5e-13], rel=1e-6)


def test_lightnings_limits_count_batches(dataset: ToyDataset) -> None:
    class Count(pl.Callback):
        steps = 0

        def on_train_end(self, trainer, pl_module) -> None:
            Count.steps = trainer.global_step

    for trainer, expected in (
        ({"limit_train_batches": 5}, 10),
        ({"limit_train_batches": 0.5}, 16),
        ({"max_steps": 21}, 21),
        ({"fast_dev_run": True}, 1),
        ({"val_check_interval": 0.5}, 32),
    ):
        model_of(callbacks=[Count()], trainer=trainer).fit(dataset)
        assert Count.steps == expected, trainer
    with pytest.raises(ConfigError, match="inner_steps=1"):
        model_of(inner_steps=4, trainer={"val_check_interval": 0.5}).fit(dataset)


def test_day_batches_train_too(dataset: ToyDataset) -> None:
    model = model_of(batch={"order": "day", "days_per_batch": 2}, trainer={"max_epochs": 3})
    model.fit(dataset)
    losses = model.evals_result_["train"]["loss"]
    assert losses[-1] < losses[0]
    # Padding is in no batch's loss: the figures are those of the samples alone.
    samples = dataset.samples("valid", data_key="learn")
    pred = model.predict(dataset, "valid").reindex(samples.index).to_numpy()
    best = model.fit_report_["best_epoch"]
    expected = ((pred - samples.target[:, 0].numpy()) ** 2).mean()
    assert model.evals_result_["valid"]["loss"][best] == pytest.approx(expected, rel=1e-5)


def test_the_seed_decides_everything_and_nothing_outside_is_touched(dataset: ToyDataset) -> None:
    network = {"_target_": "qtorch.nn.LSTM", "hidden_size": 4, "dropout": 0.5}
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first = model_of(network)
    first.fit(dataset)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12)
    second, third = model_of(network), model_of(network, seed=4)
    second.fit(dataset)
    third.fit(dataset)
    assert same(state_of(first), state_of(second))
    assert not same(state_of(first), state_of(third))


def test_any_callable_loss(dataset: ToyDataset) -> None:
    theirs = model_of(loss=torch.nn.MSELoss())
    ours = model_of()
    theirs.fit(dataset)
    ours.fit(dataset)
    assert theirs.evals_result_["train"]["loss"] == pytest.approx(
        ours.evals_result_["train"]["loss"], rel=1e-5
    )
    with pytest.raises(ConfigError, match="takes no weights"):
        model_of(loss=torch.nn.MSELoss()).fit(dataset, _FirstHalf())


@pytest.mark.slow
def test_compile(dataset: ToyDataset) -> None:
    network = {"_target_": "qtorch.nn.MLP", "layers": [8], "dropout": 0.0}
    compiled, bare = model_of(network, compile={"backend": "eager"}), model_of(network)
    compiled.fit(dataset)
    bare.fit(dataset)
    for key, value in state_of(bare).items():
        torch.testing.assert_close(state_of(compiled)[key], value)
    copy.deepcopy(compiled.network_)


def test_without_a_valid_segment_the_last_weights_stay(dataset: ToyDataset) -> None:
    lone = ToyDataset()
    del lone.segments["valid"]
    model = model_of()
    model.fit(lone)
    assert model.fit_report_["best_epoch"] is None
    assert "valid" not in model.evals_result_
    with pytest.raises(ConfigError, match="no segment 'valid'"):
        model_of(early_stop=3).fit(lone)
