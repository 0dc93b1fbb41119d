"""Tests of the trainer's arguments: wrong numbers, the end of a training, times of validations."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping
from toy_training import ToyDataset, fit_model, make_model, model_weights, same_weights
from user_networks import UserModule

from qtorch.core.errors import ConfigError
from qtorch.data.dataset.batch import Batch


class Hook(pl.Callback):
    """A callback that sees single batches, so that each is a training step of its own."""

    def __init__(self) -> None:
        self.num_batches = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.num_batches += 1


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("limit_train_batches", (0, 0.0, -1, 1.5, 4.0, True)),
        ("limit_val_batches", (-1, 1.5)),
        ("overfit_batches", (-1, -0.5)),
        ("val_check_interval", (0, -3, 1.5)),
        ("accumulate_grad_batches", (0, -2)),
        ("fast_dev_run", ("true", 2.0)),
    ],
)
def test_numbers_of_batches_that_mean_nothing_are_refused(name: str, values) -> None:
    for value in values:
        with pytest.raises(ConfigError, match=rf"trainer\.{name} is {value!r}"):
            make_model(trainer={name: value})


def test_training_of_no_step_is_warned_about(dataset: ToyDataset, caplog) -> None:
    for name in ("max_epochs", "max_steps"):
        fit_model(dataset, trainer={"max_epochs": 1, name: 0})
        assert f"trainer.{name}=0 trains nothing" in caplog.text


def test_a_profiler_may_be_configured(dataset: ToyDataset, tmp_path: Path) -> None:
    profiler = {"_target_": "pytorch_lightning.profilers.SimpleProfiler"}
    profiler |= {"dirpath": str(tmp_path), "filename": "times"}
    fit_model(dataset, trainer={"max_epochs": 1, "profiler": profiler})
    (report,) = tmp_path.iterdir()
    assert "run_training_epoch" in report.read_text()


def test_arguments_of_parameter_groups_are_those_of_the_optimizer() -> None:
    groups = {"*": {"weight_decy": 0.0}}
    model = make_model(optimizer={"optimizer": "adam", "groups": groups})
    with pytest.raises(ConfigError, match=r"'weight_decy'\. Did you mean 'weight_decay'"):
        model.check_settings()
    with pytest.raises(ConfigError, match="expected a mapping of arguments"):
        make_model(optimizer={"optimizer": "adam", "groups": {"*": 0.0}}).check_settings()


def test_validation_after_the_end_of_an_epoch_is_refused(dataset: ToyDataset) -> None:
    with pytest.raises(ConfigError, match="an epoch has 16 batches"):
        fit_model(dataset, trainer={"val_check_interval": 17})
    trainer = {"val_check_interval": 17, "check_val_every_n_epoch": None}
    assert len(fit_model(dataset, trainer=trainer).evals_result_["valid"]["loss"]) == 1


def test_last_steps_of_max_steps_are_validated_at_any_inner_steps(dataset: ToyDataset) -> None:
    trainer = {"max_epochs": -1, "max_steps": 21}  # of 16 steps in an epoch
    models = [
        fit_model(dataset, trainer=trainer, **changes)
        for changes in ({}, {"inner_steps": 3}, {"callbacks": [Hook()]})
    ]
    for model in models:
        assert len(model.evals_result_["valid"]["loss"]) == 2
        assert model.fit_report_["best_step"] == 21
        assert model.evals_result_ == models[0].evals_result_
        assert same_weights(model_weights(model), model_weights(models[0]))


def test_last_steps_of_a_user_module_are_validated(dataset: ToyDataset) -> None:
    trainer = {"max_epochs": -1, "max_steps": 21}
    model = fit_model(dataset, UserModule(4), monitor="own_valid_loss", trainer=trainer)
    assert len(model.evals_result_["valid"]["own_valid_loss"]) == 2


def test_an_interval_of_one_validates_after_each_batch(dataset: ToyDataset) -> None:
    trainer = {"val_check_interval": 1, "limit_train_batches": 5}
    model = fit_model(dataset, epochs=2, trainer=trainer)
    assert len(model.evals_result_["valid"]["loss"]) == 10
    assert model.fit_report_["inner_steps"] == 1
    bad_steps = {"_target_": "torch.optim.SGD", "lr": 2.0}
    model = fit_model(dataset, optimizer=bad_steps, early_stop=2, trainer=trainer)
    values = model.evals_result_["valid"]["loss"]
    assert len(values) == 3
    assert values[0] == min(values)


def test_an_interval_may_be_a_time(dataset: ToyDataset) -> None:
    class Wait(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            time.sleep(0.35)

    trainer = {"val_check_interval": "00:00:00:01", "limit_train_batches": 7}
    model = fit_model(dataset, epochs=1, early_stop=3, trainer=trainer, callbacks=[Wait()])
    assert len(model.evals_result_["valid"]["loss"]) >= 1
    assert math.isfinite(model.fit_report_["best_value"])


@pytest.mark.parametrize("early_stop", [None, 2])
def test_a_training_that_never_validates_says_so(dataset: ToyDataset, caplog, early_stop) -> None:
    trainer = {"check_val_every_n_epoch": 5}
    with caplog.at_level(logging.WARNING, logger="qtorch"):
        fit_model(dataset, early_stop=early_stop, trainer=trainer)
    assert "valid/loss was never computed" in caplog.text
    caplog.clear()
    fit_model(dataset, trainer={"limit_val_batches": 0})  # as the user wants it
    assert "never" not in caplog.text


def test_early_stopping_of_the_user_needs_a_validation(dataset: ToyDataset) -> None:
    hook, trainer = Hook(), {"limit_val_batches": 0}
    with pytest.raises(ConfigError, match="no validation"):
        fit_model(dataset, callbacks=[hook, EarlyStopping("valid/loss")], trainer=trainer)
    assert hook.num_batches == 0
    fit_model(dataset, callbacks=[EarlyStopping("valid/loss", strict=False)], trainer=trainer)
    fit_model(dataset, callbacks=[EarlyStopping("train/loss")], trainer=trainer)


class ManualModule(UserModule):
    """A module that steps its optimizer itself."""

    def __init__(self) -> None:
        super().__init__(4)
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward((self.scores(batch).reshape(-1) - batch.y[:, 0]).square().mean())
        optimizer.step()


@pytest.mark.parametrize(
    ("name", "value"), [("accumulate_grad_batches", 4), ("gradient_clip_val", 0.1)]
)
def test_arguments_that_manual_optimization_ignores_are_refused(
    dataset: ToyDataset, name: str, value: float
) -> None:
    with pytest.raises(ConfigError, match=rf"trainer\.{name} has no effect on ManualModule"):
        fit_model(dataset, ManualModule(), monitor="own_valid_loss", trainer={name: value})
    fit_model(dataset, ManualModule(), monitor="own_valid_loss", epochs=1)


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinite_metrics_are_never_the_best(dataset: ToyDataset, caplog, value: float) -> None:
    class Module(UserModule):
        def validation_step(self, batch: Batch, batch_idx: int) -> None:
            self.log("val_ic", torch.tensor(value if self.current_epoch else 0.1), batch_size=1)

    with caplog.at_level(logging.WARNING, logger="qtorch"):
        model = fit_model(dataset, Module(4), monitor="val_ic", epochs=3)
    assert model.fit_report_["best_epoch"] == 0
    assert "epoch 1: val_ic is infinite" in caplog.text


class SqueezingNetwork(torch.nn.Module):
    """A network that returns a score without an axis for a batch of one sample."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x[:, -1]).squeeze()


def test_a_batch_of_one_sample_may_be_squeezed(dataset: ToyDataset) -> None:
    def tail_of_one(segment: str, data_key: str) -> int:
        count = len(dataset.samples(segment, data_key=data_key))
        return next(size for size in range(20, count) if count % size == 1)

    train, valid = tail_of_one("train", "learn"), tail_of_one("valid", "learn")
    model = fit_model(dataset, SqueezingNetwork(), batch={"size": train, "eval_size": valid})
    expected = model.predict(dataset)
    model.batch["eval_size"] = tail_of_one("test", "infer")
    torch.testing.assert_close(
        torch.tensor(model.predict(dataset).to_numpy()), torch.tensor(expected.to_numpy())
    )
