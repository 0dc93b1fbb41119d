"""A finished training that is resumed with a later end equals one long training, bit for bit."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Timer
from toy_training import ToyDataset, ToyRecorder, model_weights, resumable_model, same_weights

from qtorch.data.dataset.batch import Batch
from qtorch.model.loop.checkpoint import BEST, EARLIER_BEST, LAST, PREVIOUS, read_checkpoint

pytestmark = pytest.mark.slow  # Each trains several times.

REPORTED = ("epochs", "best_epoch", "best_step", "best_value")
# An epoch has five batches.
ENDS = {
    "between two steps of the loader": ({"max_steps": 2}, {"max_steps": 7}, 2),
    "inside a step of the loader": ({"max_steps": 3}, {"max_steps": 7}, 2),
    "inside the last step of the second epoch": ({"max_steps": 9}, {"max_steps": 11}, 64),
    "in the first epoch of one step": ({"max_steps": 3}, {"max_steps": 6}, 64),
    "at the end of an epoch": ({"max_steps": 5}, {"max_steps": 8}, 2),
    "then by epochs": ({"max_steps": 7}, {"max_epochs": 2}, 2),
    "first by epochs": ({"max_epochs": 1}, {"max_steps": 8}, 2),
    "by epochs": ({"max_epochs": 1}, {"max_epochs": 2}, 2),
    "accumulated": (
        {"max_steps": 4, "accumulate_grad_batches": 2},
        {"max_steps": 7, "accumulate_grad_batches": 2},
        3,
    ),
    "of fewer batches": (
        {"max_steps": 5, "limit_train_batches": 4},
        {"max_steps": 9, "limit_train_batches": 4},
        3,
    ),
    "with the validation of an interval": (
        {"max_steps": 7, "val_check_interval": 2},
        {"max_steps": 9, "val_check_interval": 2},
        1,
    ),
}


class UserModule(pl.LightningModule):
    """A module with a training step of its own, which logs in each step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Sequential(torch.nn.Linear(12, 4), torch.nn.Dropout(0.2))

    def training_step(self, batch: Batch) -> torch.Tensor:
        loss = (self.layer(batch.x.flatten(1)).mean(1) - batch.y[:, 0]).square().mean()
        self.log("train/loss", loss, on_epoch=True, on_step=False, batch_size=len(batch.y))
        return loss

    def validation_step(self, batch: Batch) -> None:
        loss = (self.predict_step(batch) - batch.y[:, 0]).square().mean()
        self.log("valid/rank_ic", -loss, batch_size=len(batch.y))

    def predict_step(self, batch: Batch) -> torch.Tensor:
        return self.layer(batch.x.flatten(1)).mean(1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.05)


def fit(folder: Path, trainer: dict, inner_steps: int = 2, **changes):
    torch.set_num_threads(1)
    folder.mkdir(exist_ok=True)
    model = resumable_model(
        network=changes.pop("network", {"_target_": "qtorch.nn.MLP", "layers": [4]}),
        batch={"size": 200},
        trainer={"accelerator": "cpu", "enable_progress_bar": False, **trainer},
        inner_steps=inner_steps,
        checkpoint={},
        **changes,
    )
    model.fit(ToyDataset(), recorder=ToyRecorder(folder))
    return model


def assert_same_fit(model, expected) -> None:
    assert same_weights(model_weights(model), model_weights(expected))
    assert model.evals_result_ == expected.evals_result_
    for name in REPORTED:
        assert model.fit_report_[name] == expected.fit_report_[name], name


def assert_same_checkpoints(folder: Path, expected: Path) -> None:
    for name in (LAST, BEST):
        states = [read_checkpoint(f / "checkpoints" / name) for f in (folder, expected)]
        assert same_weights(*(state["state_dict"] for state in states)), name


@pytest.mark.parametrize("end", ENDS)
def test_longer_fit_is_as_if_there_had_been_no_end(tmp_path: Path, end: str) -> None:
    short, long, inner_steps = ENDS[end]
    shorter = fit(tmp_path / "run", short, inner_steps)
    repeated = fit(tmp_path / "run", short, inner_steps)
    assert_same_fit(repeated, shorter)
    longer = fit(tmp_path / "run", long, inner_steps)
    expected = fit(tmp_path / "whole", long, inner_steps)
    assert_same_fit(longer, expected)
    assert_same_checkpoints(tmp_path / "run", tmp_path / "whole")
    assert_same_fit(fit(tmp_path / "run", long, inner_steps), expected)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_longer_fit_of_a_module_of_the_user(tmp_path: Path, accumulate: int) -> None:
    trainer = {"accumulate_grad_batches": accumulate}
    options = {"network": UserModule(), "optimizer": None, "scheduler": None}
    fit(tmp_path / "run", {"max_steps": 4, **trainer}, **options)
    longer = fit(tmp_path / "run", {"max_steps": 8, **trainer}, **options)
    expected = fit(tmp_path / "whole", {"max_steps": 8, **trainer}, **options)
    assert_same_fit(longer, expected)


def test_longer_fit_twice(tmp_path: Path) -> None:
    for max_steps in (3, 7, 13):
        longer = fit(tmp_path / "run", {"max_steps": max_steps})
    assert_same_fit(longer, fit(tmp_path / "whole", {"max_steps": 13}))


class StepClock(pl.Callback):
    """Let Lightning's timers count a second for each optimizer step."""

    seconds = 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, *_) -> None:
        StepClock.seconds = float(trainer.global_step)


def test_longer_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def count_seconds(timer: Timer, stage: str = "train") -> float:
        return max(StepClock.seconds, timer._offset)

    monkeypatch.setattr(Timer, "time_elapsed", count_seconds)

    def fit_seconds(seconds: int, folder: str):
        monkeypatch.setattr(StepClock, "seconds", 0.0)
        trainer = {"max_epochs": 9, "max_time": {"seconds": seconds}, "callbacks": [StepClock()]}
        return fit(tmp_path / folder, trainer, 2)

    shorter = fit_seconds(7, "run")
    assert_same_fit(fit_seconds(7, "run"), shorter)
    longer, expected = fit_seconds(12, "run"), fit_seconds(12, "whole")
    assert expected.fit_report_["epochs"] == 3
    assert_same_fit(longer, expected)


def test_end_without_an_earlier_checkpoint_starts_from_scratch(tmp_path: Path, caplog) -> None:
    fit(tmp_path / "run", {"max_steps": 7})
    (tmp_path / "run" / "checkpoints" / PREVIOUS).unlink()
    with caplog.at_level(logging.INFO, logger="qtorch"):
        longer = fit(tmp_path / "run", {"max_steps": 9})
    assert "no checkpoint from before the end of the training inside epoch 1" in caplog.text
    assert_same_fit(longer, fit(tmp_path / "whole", {"max_steps": 9}))


def test_copied_end_is_resumed_with_a_warning(tmp_path: Path, caplog) -> None:
    fit(tmp_path / "run", {"max_steps": 7})
    copy = tmp_path / "copy.ckpt"
    shutil.copy(tmp_path / "run" / "checkpoints" / LAST, copy)
    model = resumable_model(
        network={"_target_": "qtorch.nn.MLP", "layers": [4]},
        batch={"size": 200},
        trainer={"accelerator": "cpu", "enable_progress_bar": False, "max_steps": 9},
    )
    model.fit(ToyDataset(), resume=copy)
    assert f"{copy} is the end of a shorter training inside epoch 1" in caplog.text


def test_best_checkpoint_of_whole_epochs_comes_back(tmp_path: Path) -> None:
    rising = {"monitor": "train_loss", "optimizer": {"_target_": "torch.optim.Adam", "lr": 3.0}}
    options = {**rising, "early_stop": {"patience": 9, "mode": "max"}, "scheduler": None}
    fit(tmp_path / "run", {"max_steps": 6}, **options)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert (checkpoints / EARLIER_BEST).exists() == (
        read_checkpoint(checkpoints / BEST)["global_step"] == 6
    )
    fit(tmp_path / "run", {"max_steps": 10}, **options)
    fit(tmp_path / "whole", {"max_steps": 10}, **options)
    assert_same_checkpoints(tmp_path / "run", tmp_path / "whole")


def test_training_that_early_stopping_has_ended_stays_ended(tmp_path: Path) -> None:
    options = {"monitor": "loss", "optimizer": {"_target_": "torch.optim.Adam", "lr": 0.5}}
    trainer = {"max_epochs": 30}
    shorter = fit(tmp_path / "run", trainer, early_stop=0, **options)
    assert shorter.fit_report_["epochs"] < 30
    assert_same_fit(fit(tmp_path / "run", trainer, early_stop=0, **options), shorter)
    longer = fit(tmp_path / "run", trainer, early_stop=2, **options)
    assert longer.fit_report_["epochs"] > shorter.fit_report_["epochs"]
    assert_same_fit(longer, fit(tmp_path / "whole", trainer, early_stop=2, **options))


@pytest.mark.parametrize(
    "schedule",
    [
        {"_target_": "qtorch.model.WarmupCosine"},
        {"_target_": "torch.optim.lr_scheduler.OneCycleLR", "max_lr": 0.01},
        {"_target_": "torch.optim.lr_scheduler.CosineAnnealingLR", "T_max": "max_epochs"},
    ],
    ids=["warm-up and cosine", "one cycle", "cosine by epochs"],
)
def test_longer_fit_of_a_schedule_over_its_length_starts_from_scratch(
    tmp_path: Path, schedule: dict
) -> None:
    fit(tmp_path / "run", {"max_epochs": 2}, scheduler=schedule)
    longer = fit(tmp_path / "run", {"max_epochs": 4}, scheduler=schedule)
    expected = fit(tmp_path / "whole", {"max_epochs": 4}, scheduler=schedule)
    assert longer.fit_report_["resumed_from"] is None
    assert_same_fit(longer, expected)
    repeated = fit(tmp_path / "run", {"max_epochs": 4}, scheduler=schedule)
    assert repeated.fit_report_["resumed_from"] is not None
    assert_same_fit(repeated, expected)
