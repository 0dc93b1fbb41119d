"""A user's LightningModule that is stopped and resumed ends like an uninterrupted training."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from toy_training import ToyDataset, ToyRecorder, resumable_model

from qtorch.data.dataset.batches import BatchLoader
from qtorch.model.loop.checkpoint import CheckpointCallback
from qtorch.model.loop.interruption import TrainingInterrupted

USER_MODEL = {
    "network": {"_target_": "user_networks.LoggingModule"},
    "monitor": "own_valid_loss",
    "early_stop": None,
    "scheduler": None,
    "inner_steps": "auto",
    "trainer": {"max_epochs": 3, "accelerator": "cpu", "enable_progress_bar": False},
}


class _Stop(Exception):
    """Ends a training as a kill would: nothing runs after it."""


def _fit(folder: Path, **changes):
    recorder = ToyRecorder(folder)
    folder.mkdir(exist_ok=True)
    model = resumable_model(**{**USER_MODEL, **changes})
    model.fit(ToyDataset(), recorder=recorder)
    return model, recorder.history()


@pytest.fixture(scope="module")
def reference_fit(tmp_path_factory: pytest.TempPathFactory):
    torch.set_num_threads(1)
    return _fit(tmp_path_factory.mktemp("own"))


def _assert_same(resumed_fit, reference_fit) -> None:
    (model, history), (expected_model, expected_history) = resumed_fit, reference_fit
    first, second = model.network_.state_dict(), expected_model.network_.state_dict()
    assert all(torch.equal(first[k], second[k]) for k in second)
    assert history == expected_history
    assert model.evals_result_ == expected_model.evals_result_
    assert model.fit_report_["resumed_from"] is not None


def _interrupt_fit(
    monkeypatch: pytest.MonkeyPatch, folder: Path, kind: str, position: str, **changes
) -> None:
    """Run a training that is killed before a batch ("epoch:batch"), or gets a signal there."""
    original_batches = BatchLoader.batches

    def interrupting_batches(self, epoch: int, start_step: int = 0):
        for step, batch in enumerate(original_batches(self, epoch, start_step), start_step):
            if self.order == "random" and f"{epoch}:{step}" == position:
                if kind == "killed":
                    raise _Stop
                os.kill(os.getpid(), signal.SIGINT)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(BatchLoader, "batches", interrupting_batches)
        with pytest.raises(_Stop if kind == "killed" else TrainingInterrupted):
            _fit(folder, **changes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "interruption",
    ["killed at 0:6", "killed at 1:0", "killed at 1:13", "stopped at 1:6", "stopped at 0:19"],
)
def test_interrupted_training_resumes_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference_fit, interruption: str
) -> None:
    """Checkpoints come after every fourth of 20 batches; an orderly stop writes another one."""
    _interrupt_fit(monkeypatch, tmp_path / "run", *interruption.split(" at "))
    _assert_same(_fit(tmp_path / "run"), reference_fit)


def test_stop_waits_for_a_validation_in_the_middle_of_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"trainer": {**USER_MODEL["trainer"], "val_check_interval": 4, "max_epochs": 1}}
    _interrupt_fit(monkeypatch, tmp_path / "run", "stopped", "0:11", **changes)
    _assert_same(_fit(tmp_path / "run", **changes), _fit(tmp_path / "whole", **changes))


def test_metrics_of_the_last_epoch_are_sent_on_resume_without_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference_fit
) -> None:
    """Lightning logs the means of an epoch after its checkpoint is written."""
    original_hook = CheckpointCallback.on_train_epoch_end

    def failing_hook(self, trainer, module):
        original_hook(self, trainer, module)
        if trainer.current_epoch == 2:
            raise _Stop

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointCallback, "on_train_epoch_end", failing_hook)
        with pytest.raises(_Stop):
            _fit(tmp_path / "run")
    _assert_same(_fit(tmp_path / "run"), reference_fit)
