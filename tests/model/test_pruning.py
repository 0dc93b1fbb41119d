"""A search's pruner stops a training in order; a database that is gone stops nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest
from forked_ranks import DDP
from toy_training import ToyRecorder

from qtorch.core.errors import ConfigError
from qtorch.model import pruning
from qtorch.model.lightning_model import LightningModel
from qtorch.tracking.trials.place import PRUNED_TAG, TRIAL_VARIABLE

NAMED = {"study": "s", "id": 1, "number": 0, "storage": None, "pruner": "median"}


class Judge:
    """A trial that is to stop at one epoch; keeps what it was told."""

    pruner = "Judge"

    def __init__(self, at: int | None) -> None:
        self.at, self.told = at, []

    def should_stop(self, step: int, value: float) -> bool:
        self.told.append((step, value))
        if self.at is None:
            raise ConnectionError("gone")
        return step == self.at


@pytest.fixture
def fitted(dataset, recorder: ToyRecorder, monkeypatch):
    tags: dict[str, str] = {}
    recorder.set_tags = lambda **given: tags.update(given)  # type: ignore[attr-defined]

    def fit(
        judge: Judge, report: str = "valid/rank_ic", **trainer: Any
    ) -> tuple[LightningModel, dict[str, str]]:
        # `run` is the process's own: a rank's stands for this one's recorder.
        monkeypatch.setattr(
            "qtorch.model.training.pruning_callbacks",
            lambda run: [pruning.Pruning(judge, report, run)],
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
        return model, tags

    return fit


def test_a_pruned_training_ends_as_any_other(fitted):
    judge = Judge(at=1)
    model, tags = fitted(judge)
    values = model.evals_result_["valid"]["rank_ic"]
    assert [step for step, _ in judge.told] == [0, 1]
    assert [value for _, value in judge.told] == pytest.approx(values)
    assert model.fit_report_["epochs"] == 2
    assert model.fit_report_["best_value"] == max(values)
    assert tags[PRUNED_TAG].startswith("after epoch 1 with valid/rank_ic")


@pytest.mark.slow
def test_on_several_devices_all_stop_together(fitted, forked):
    model, tags = fitted(Judge(at=1), **DDP)
    assert len(forked) == 2
    assert model.fit_report_["epochs"] == 2
    assert model.fit_report_["best_value"] == max(model.evals_result_["valid"]["rank_ic"])
    assert tags[PRUNED_TAG].startswith("after epoch 1 with valid/rank_ic")


def test_a_trial_that_cannot_be_reached_stops_nothing(fitted, caplog):
    model, tags = fitted(Judge(at=None))
    assert model.fit_report_["epochs"] == 4
    assert not tags
    assert "could not be reported" in caplog.text


def test_a_metric_that_there_is_not_is_told(fitted):
    with pytest.raises(ConfigError, match="Did you mean 'valid/rank_ic'"):
        fitted(Judge(at=1), report="valid/rankic")


def test_outside_of_a_search_there_is_nothing(monkeypatch):
    monkeypatch.delenv(TRIAL_VARIABLE, raising=False)
    assert pruning.pruning_callbacks(None) == []
    monkeypatch.setenv(TRIAL_VARIABLE, json.dumps({**NAMED, "report": "x", "pruner": None}))
    assert pruning.pruning_callbacks(None) == []
