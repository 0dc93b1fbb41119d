"""A search's pruner stops a training in an orderly way; an unreachable database stops nothing."""

from __future__ import annotations

from typing import Any

import pytest
from forked_ranks import DDP
from toy_training import ToyRecorder

from qtorch.core.errors import ConfigError
from qtorch.model.lightning_model import LightningModel
from qtorch.model.loop import callbacks as pruning
from qtorch.tracking.pruning import PRUNED_TAG, TRIAL_VARIABLE


class FakeTrial:
    """A trial that should stop at one epoch; it records what was reported to it."""

    pruner_name = "FakeTrial"

    def __init__(self, stop_epoch: int | None) -> None:
        self.stop_epoch, self.reports = stop_epoch, []

    def should_stop(self, step: int, value: float) -> bool:
        self.reports.append((step, value))
        if self.stop_epoch is None:
            raise ConnectionError("gone")
        return step == self.stop_epoch


@pytest.fixture
def fit_with_trial(dataset, recorder: ToyRecorder, monkeypatch):
    def fit(
        trial: FakeTrial, report: str = "valid/rank_ic", **trainer: Any
    ) -> tuple[LightningModel, dict[str, str]]:
        # `run` is the process's own recorder: in a rank it stands in for the parent's.
        monkeypatch.setattr(
            "qtorch.model.loop.training.pruning_callbacks",
            lambda run: [pruning.PruningCallback(trial, report, run)],
        )
        model = LightningModel(
            {"_target_": "qtorch.nn.MLP", "layers": [8], "dropout": 0.0},
            trainer={
                "max_epochs": 4,
                "accelerator": "cpu",
                "enable_progress_bar": False,
                **trainer,
            },
            monitor="rank_ic",
            seed=0,
        )
        model.fit(dataset, recorder=recorder)
        return model, recorder.tags

    return fit


def test_pruned_training_ends_like_any_other(fit_with_trial):
    trial = FakeTrial(stop_epoch=1)
    model, tags = fit_with_trial(trial)
    values = model.evals_result_["valid"]["rank_ic"]
    assert [step for step, _ in trial.reports] == [0, 1]
    assert [value for _, value in trial.reports] == pytest.approx(values)
    assert model.fit_report_["epochs"] == 2
    assert model.fit_report_["best_value"] == max(values)
    assert tags[PRUNED_TAG].startswith("after epoch 1 with valid/rank_ic")


@pytest.mark.slow
def test_pruning_stops_all_devices_together(fit_with_trial, rank_processes):
    model, tags = fit_with_trial(FakeTrial(stop_epoch=1), **DDP)
    assert len(rank_processes) == 2
    assert model.fit_report_["epochs"] == 2
    assert model.fit_report_["best_value"] == max(model.evals_result_["valid"]["rank_ic"])
    assert tags[PRUNED_TAG].startswith("after epoch 1 with valid/rank_ic")


def test_unreachable_trial_stops_nothing(fit_with_trial, caplog):
    model, tags = fit_with_trial(FakeTrial(stop_epoch=None))
    assert model.fit_report_["epochs"] == 4
    assert not tags
    assert "could not report to the trial" in caplog.text


def test_unknown_metric_to_report_suggests_the_nearest_name(fit_with_trial):
    with pytest.raises(ConfigError, match="Did you mean 'valid/rank_ic'"):
        fit_with_trial(FakeTrial(stop_epoch=1), report="valid/rankic")


def test_no_callback_outside_of_a_search(monkeypatch):
    monkeypatch.delenv(TRIAL_VARIABLE, raising=False)
    assert pruning.pruning_callbacks(None) == []
