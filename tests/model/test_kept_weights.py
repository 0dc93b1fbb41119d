"""Tests that the weights of a fit are those that its best validation has seen."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint
from toy_training import (
    ToyDataset,
    ToyRecorder,
    fit_model,
    make_model,
    model_weights,
    same_weights,
)
from user_networks import UserModule

from qtorch.core.errors import ConfigError
from qtorch.metrics.loss import MSE
from qtorch.model import EpochAveraging
from qtorch.model.loop.progress import FitProgress, find_metric
from qtorch.model.loop.scoring import ForwardAdapter

pytestmark = pytest.mark.slow  # Each trains several times.

FAST = {"_target_": "torch.optim.Adam", "lr": 0.1}


def valid_loss(model: Any, dataset: ToyDataset) -> float:
    """The mean squared error of the model's network on the valid segment."""
    samples = dataset.samples("valid", data_key="learn")
    batch = samples.batch(torch.arange(len(samples)))
    network = model.network_.eval()
    forward = network.scores if isinstance(network, UserModule) else ForwardAdapter(network)
    scores = forward(batch)
    return float((scores.detach().reshape(-1) - batch.y[:, 0]).square().mean())


@pytest.mark.parametrize(
    "trainer",
    [
        {"val_check_interval": 5},
        {"val_check_interval": 0.3, "max_epochs": 3},
        {"val_check_interval": 11, "check_val_every_n_epoch": None, "max_epochs": 3},
        {"val_check_interval": 5, "accumulate_grad_batches": 3},
        {"check_val_every_n_epoch": 2, "max_epochs": 5},
    ],
)
def test_kept_weights_are_those_of_the_best_validation(dataset: ToyDataset, trainer) -> None:
    model = fit_model(dataset, optimizer=FAST, trainer=trainer)
    values = model.evals_result_["valid"]["loss"]
    assert model.fit_report_["best_value"] == min(values)
    assert valid_loss(model, dataset) == pytest.approx(min(values), rel=1e-5)
    assert len(set(values)) == len(values) > 1
    assert model.fit_report_["epochs"] == len(model.evals_result_["train"]["loss"])


@pytest.mark.parametrize("monitor", ["own_valid_loss", "loss"])
def test_kept_weights_of_a_user_module(dataset: ToyDataset, monitor: str) -> None:
    class Module(UserModule):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            loss = torch.nn.functional.mse_loss(self.scores(batch), batch.y[:, 0])
            name = monitor if monitor != "loss" else "val_loss"
            self.log(name, loss, batch_size=len(batch.x))

    network = Module(4, lr=0.4, dropout=0.0)
    trainer = {"val_check_interval": 5}
    model = fit_model(dataset, network, epochs=2, monitor=monitor, early_stop=9, trainer=trainer)
    name = monitor if monitor != "loss" else "val_loss"
    values = model.evals_result_["valid"][name]
    assert len(values) == 6
    assert valid_loss(model, dataset) == pytest.approx(min(values), rel=1e-5)
    assert set(model.evals_result_["train"]) == {"own_loss"}
    assert len(model.evals_result_["train"]["own_loss"]) == 2


def test_each_validation_is_a_point_of_the_curve(
    dataset: ToyDataset, recorder: ToyRecorder
) -> None:
    model = fit_model(dataset, recorder=recorder, trainer={"val_check_interval": 5})
    num_batches = math.ceil(model.fit_report_["samples"] / 64)
    points = recorder.history()
    per_epoch = range(5, num_batches + 1, 5)
    steps = [epoch * num_batches + k for epoch in range(2) for k in per_epoch]
    assert [s for k, s in points if k == "valid/loss"] == steps
    assert [s for k, s in points if k == "train/loss"] == [num_batches, 2 * num_batches]
    assert [v for (k, _), v in points.items() if k == "valid/loss"] == (
        model.evals_result_["valid"]["loss"]
    )


@pytest.mark.parametrize(
    "callback",
    [
        EMAWeightAveraging(decay=0.9),
        EpochAveraging(start=1),
        {"_target_": "pytorch_lightning.callbacks.EMAWeightAveraging", "decay": 0.8},
    ],
    ids=["EMA", "epochs", "configured"],
)
@pytest.mark.parametrize("interval", [1.0, 5])
def test_kept_weights_are_the_averaged_ones_that_were_validated(
    dataset: ToyDataset, callback, interval
) -> None:
    arguments = {"epochs": 3, "optimizer": FAST, "trainer": {"val_check_interval": interval}}
    model = fit_model(dataset, callbacks=[callback], **arguments)
    values = model.evals_result_["valid"]["loss"]
    assert valid_loss(model, dataset) == pytest.approx(min(values), rel=1e-5)
    plain_values = fit_model(dataset, **arguments).evals_result_["valid"]["loss"]
    assert values != plain_values


def test_averaged_weights_match_a_hand_written_average(dataset: ToyDataset) -> None:
    class Record(pl.Callback):
        def __init__(self) -> None:
            self.weights: list[torch.Tensor] = []

        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            parameters = torch.nn.utils.parameters_to_vector(module.network.parameters())
            self.weights.append(parameters.detach().clone())

    record = Record()
    average = EMAWeightAveraging(decay=0.75)
    model = fit_model(dataset, epochs=1, callbacks=[record, average])
    expected = record.weights[0]  # the first update copies the weights
    for weights in record.weights[1:]:
        expected = 0.75 * expected + 0.25 * weights
    own = torch.nn.utils.parameters_to_vector(model.network_.parameters())
    torch.testing.assert_close(own, expected)


def test_averaging_resumes_exactly(dataset: ToyDataset, tmp_path: Path) -> None:
    class Fail(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            if trainer.current_epoch == 2:
                raise RuntimeError("killed")

    arguments = {"epochs": 4, "optimizer": FAST, "checkpoint": {"dir": str(tmp_path / "c")}}

    def callbacks() -> list[Any]:
        return [EMAWeightAveraging(decay=0.9)]

    with pytest.raises(RuntimeError, match="killed"):
        fit_model(dataset, callbacks=[*callbacks(), Fail()], **arguments)
    resumed = fit_model(dataset, callbacks=callbacks(), **arguments)
    assert resumed.fit_report_["resumed_from"] is not None
    arguments["checkpoint"] = {"enabled": False}
    whole = fit_model(dataset, callbacks=callbacks(), **arguments)
    assert same_weights(model_weights(resumed), model_weights(whole))
    assert resumed.evals_result_ == whole.evals_result_


@pytest.mark.parametrize("epoch", [0, 1])
def test_validations_within_epochs_resume_exactly(
    dataset: ToyDataset, tmp_path: Path, epoch: int
) -> None:
    class Fail(pl.Callback):
        def on_train_batch_start(
            self, trainer: Any, module: Any, batch: Any, batch_idx: int
        ) -> None:
            if (trainer.current_epoch, batch_idx) == (epoch, 8):
                raise RuntimeError("killed")

    checkpoint = {"dir": str(tmp_path / "c"), "every_n_steps": 3}
    arguments: dict[str, Any] = {"optimizer": FAST, "trainer": {"val_check_interval": 4}}
    recorders = [ToyRecorder(tmp_path), ToyRecorder(tmp_path)]  # one file
    with pytest.raises(RuntimeError, match="killed"):
        fit_model(
            dataset, callbacks=[Fail()], checkpoint=checkpoint, recorder=recorders[0], **arguments
        )
    resumed = fit_model(dataset, checkpoint=checkpoint, recorder=recorders[1], **arguments)
    whole = fit_model(dataset, **arguments)
    assert resumed.fit_report_["resumed_from"] is not None
    assert same_weights(model_weights(resumed), model_weights(whole))
    assert resumed.evals_result_ == whole.evals_result_
    history = recorders[1].history()  # raises if a step has two values
    assert [v for (k, _), v in history.items() if k == "valid/loss"] == (
        whole.evals_result_["valid"]["loss"]
    )


def test_early_stop_within_an_epoch_keeps_the_best_weights(dataset: ToyDataset) -> None:
    trainer = {"val_check_interval": 2, "max_epochs": 5}
    model = fit_model(
        dataset, optimizer={"_target_": "torch.optim.SGD", "lr": 0.6}, early_stop=2, trainer=trainer
    )
    values = model.evals_result_["valid"]["loss"]
    assert values[-3] == min(values)
    assert valid_loss(model, dataset) == pytest.approx(min(values), rel=1e-5)


def test_sanity_validation_is_no_point(dataset: ToyDataset) -> None:
    model = fit_model(dataset, trainer={"num_sanity_val_steps": 2})
    assert len(model.evals_result_["valid"]["loss"]) == 2
    assert model.fit_report_["best_epoch"] in (0, 1)


class ScheduleFree(torch.optim.SGD):
    """An optimizer that evaluates other weights than it trains, as schedule-free ones do."""

    shift = 0.25

    def __init__(self, parameters: Any, lr: float = 0.05) -> None:
        super().__init__(parameters, lr=lr)
        self.is_training = False

    def _move(self, is_training: bool) -> None:
        if is_training != self.is_training:
            with torch.no_grad():
                for parameter in self.param_groups[0]["params"]:
                    parameter.add_(self.shift if is_training else -self.shift)
        self.is_training = is_training

    def train(self) -> None:
        self._move(True)

    def eval(self) -> None:
        self._move(False)

    def step(self, closure: Any = None) -> Any:
        assert self.is_training
        return super().step(closure)


def test_schedule_free_optimizer_is_validated_in_evaluation_mode(dataset: ToyDataset) -> None:
    model = fit_model(dataset, optimizer=ScheduleFree, epochs=3)
    values = model.evals_result_["valid"]["loss"]
    assert valid_loss(model, dataset) == pytest.approx(min(values), rel=1e-4)


def test_metric_names_of_a_segment() -> None:
    assert find_metric("valid/loss", ["val_loss", "train_loss"]) == "val_loss"
    assert find_metric("valid/loss", ["validation/loss"]) == "validation/loss"
    assert find_metric("valid/ic", ["val-ic", "val_rank_ic"]) == "val-ic"
    assert find_metric("train/loss", ["train_loss", "val_loss"]) == "train_loss"
    assert find_metric("valid/loss", ["val_loss", "valid_loss"]) == "valid/loss"  # not clear which
    assert find_metric("own", ["val_own"]) == "own"


def test_old_checkpoints_have_a_point_for_each_epoch() -> None:
    (member,) = FitProgress.from_states([{"history": [{"a": 1.0}, {"a": 2.0}], "best_epoch": 1}])
    assert (member.epochs, member.steps, member.best_epoch) == (2, [0, 1], 1)


def test_no_validation_is_refused_with_an_early_stop(dataset: ToyDataset) -> None:
    trainer = {"limit_val_batches": 0}
    with pytest.raises(ConfigError, match="limit_val_batches=0 turns validation off"):
        make_model(early_stop=3, trainer=trainer)
    model = make_model(trainer=trainer)
    model.fit(dataset)
    assert set(model.evals_result_) == {"train"}
    with pytest.raises(ConfigError, match="limit_val_batches"):
        model.finetune(dataset, early_stop=3)
    assert isinstance(model.loss, str | MSE)


@pytest.mark.parametrize("is_user_module", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"monitor": "valid/loss"}, {"every_n_train_steps": 5}, {"val_check_interval": 8}],
)
def test_files_of_a_model_checkpoint_resume_exactly(
    dataset: ToyDataset, tmp_path: Path, options, is_user_module: bool
) -> None:
    network = UserModule(4) if is_user_module else None
    monitor = "own_valid_loss" if is_user_module else "loss"
    options, trainer = dict(options), {"max_epochs": 3}
    if "val_check_interval" in options:
        trainer["val_check_interval"] = options.pop("val_check_interval")
        options["monitor"] = "own_valid_loss" if is_user_module else "valid/loss"
    elif "monitor" in options and is_user_module:
        options["monitor"] = "own_valid_loss"
    arguments: dict[str, Any] = {"optimizer": FAST, "monitor": monitor, "trainer": trainer}
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, **options)
    whole = fit_model(dataset, network, callbacks=[saver], **arguments)
    paths = list(tmp_path.glob("*.ckpt"))
    assert len(paths) >= 3
    for path in paths:
        model = make_model(network, **arguments)
        model.fit(dataset, resume=path)
        assert model.evals_result_ == whole.evals_result_, path.name
        assert model.fit_report_["best_step"] == whole.fit_report_["best_step"]
        assert same_weights(model_weights(model), model_weights(whole))


def test_checkpoint_before_an_epoch_was_recorded_is_refused(
    dataset: ToyDataset, tmp_path: Path
) -> None:
    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    fit_model(dataset, callbacks=[Save()])
    with pytest.raises(ConfigError, match="end of epoch 0, before its metrics were complete"):
        make_model().fit(dataset, resume=tmp_path / "0.ckpt")
