"""A user's LightningModule that was stopped and resumed is the training that never was."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from toy_training import ToyDataset, ToyRecorder, resumable_model

from qtorch.data.batches import BatchLoader
from qtorch.model.interruption import TrainingInterrupted
from qtorch.model.keeper import Keeper

OWN = {
    "network": {"_target_": "user_networks.Talkative"},
    "monitor": "own_valid_loss",
    "early_stop": None,
    "scheduler": None,
    "inner_steps": "auto",
    "trainer": {"max_epochs": 3, "accelerator": "cpu", "enable_progress_bar": False},
}


class _Stop(Exception):
    """Ends a training as a kill would: nothing comes after it."""


def _fit(folder: Path, **changes):
    recorder = ToyRecorder(folder)
    folder.mkdir(exist_ok=True)
    model = resumable_model(**{**OWN, **changes})
    model.fit(ToyDataset(), recorder=recorder)
    return model, recorder.history()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory):
    torch.set_num_threads(1)
    return _fit(tmp_path_factory.mktemp("own"))


def _same(resumed, whole) -> None:
    (model, history), (other, expected) = resumed, whole
    first, second = model.network_.state_dict(), other.network_.state_dict()
    assert all(torch.equal(first[k], second[k]) for k in second)
    assert history == expected
    assert model.evals_result_ == other.evals_result_
    assert model.fit_report_["resumed_from"] is not None


def _ended(monkeypatch: pytest.MonkeyPatch, folder: Path, kind: str, at: str, **changes) -> None:
    """A training that is killed before a batch ("epoch:batch"), or told to stop in it."""
    whole = BatchLoader.batches

    def ending(self, epoch: int, start_step: int = 0):
        for k, batch in enumerate(whole(self, epoch, start_step), start_step):
            if self.order == "random" and f"{epoch}:{k}" == at:
                if kind == "killed":
                    raise _Stop
                os.kill(os.getpid(), signal.SIGINT)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(BatchLoader, "batches", ending)
        with pytest.raises(_Stop if kind == "killed" else TrainingInterrupted):
            _fit(folder, **changes)


@pytest.mark.parametrize(
    "how", ["killed at 0:6", "killed at 1:0", "killed at 1:13", "stopped at 1:6", "stopped at 0:19"]
)
def test_stopped_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted, how: str
) -> None:
    """A checkpoint after each fourth of 20 batches; a stop in order writes one of its own."""
    _ended(monkeypatch, tmp_path / "run", *how.split(" at "))
    _same(_fit(tmp_path / "run"), uninterrupted)


def test_a_stop_before_a_validation_in_mid_epoch_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"trainer": {**OWN["trainer"], "val_check_interval": 4, "max_epochs": 1}}
    _ended(monkeypatch, tmp_path / "run", "stopped", "0:11", **changes)
    _same(_fit(tmp_path / "run", **changes), _fit(tmp_path / "whole", **changes))


def test_what_the_last_epoch_had_not_yet_logged_is_sent_without_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted
) -> None:
    """Lightning logs an epoch's means behind its checkpoint."""
    whole = Keeper.on_train_epoch_end

    def ending(self, trainer, module):
        whole(self, trainer, module)
        if trainer.current_epoch == 2:
            raise _Stop

    with monkeypatch.context() as patch:
        patch.setattr(Keeper, "on_train_epoch_end", ending)
        with pytest.raises(_Stop):
            _fit(tmp_path / "run")
    _same(_fit(tmp_path / "run"), uninterrupted)
