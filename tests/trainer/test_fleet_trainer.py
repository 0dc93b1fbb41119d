"""Tasks that are trained at once have the runs that TrainerR would have given them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import pytest

from qtorch.study.rolling import rolling_study
from qtorch.tracking.manager import R
from qtorch.tracking.recorder import Recorder, current_recorder
from qtorch.trainer import FleetTrainer, TrainerR

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("single_thread")]


def make_task(seed: int, lr: float = 0.01, **model: Any) -> dict[str, Any]:
    return {
        "model": {
            "_target_": "qtorch.model.LightningModel",
            "network": {"_target_": "qtorch.nn.GRU", "hidden_size": 8, "num_layers": 1},
            "optimizer": {"lr": lr},
            "trainer": {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False},
            **model,
        },
        "dataset": {
            "_target_": "qtorch.data.TSDatasetH",
            "step_len": 4,
            "handler": {
                "_target_": "qtorch.data.DataHandlerLP",
                "data_loader": {
                    "_target_": "qtorch.data.QlibDataLoader",
                    "config": {
                        "feature": [["$close/Ref($close,1)-1", "$open/$close-1"], ["F0", "F1"]],
                        "label": [["Ref($close,-2)/Ref($close,-1)-1"], ["LABEL0"]],
                    },
                    "source": {
                        "_target_": "qtorch.data.SyntheticSource",
                        "num_instruments": 15,
                        "start_time": "2020-01-01",
                        "end_time": "2020-12-31",
                    },
                },
                "infer_processors": [{"class": "Fillna"}],
                "learn_processors": [{"class": "DropnaLabel"}],
            },
            "segments": {
                "train": ["2020-02-01", "2020-06-30"],
                "valid": ["2020-07-01", "2020-08-31"],
                "test": ["2020-09-01", "2020-12-20"],
            },
        },
        "record": ["SignalRecord", "SigAnaRecord"],
        "seed": seed,
    }


def test_runs_equal_those_of_trainer_r(store: str) -> None:
    tasks = [make_task(1), make_task(2), make_task(2, lr=0.003), make_task(3, early_stop=1)]
    fleet, single = FleetTrainer("fleet")(tasks), TrainerR("single")(tasks)
    assert [r.load_object("task")["seed"] for r in fleet] == [1, 2, 2, 3]
    for run, other in zip(fleet, single, strict=True):
        assert (run.status, run.experiment_name) == (Recorder.STATUS_FI, "fleet")
        assert set(run.list_artifacts()) == set(other.list_artifacts())
        assert run.list_params().keys() == other.list_params().keys()
        metrics, expected = run.list_metrics(), other.list_metrics()
        assert metrics == pytest.approx(expected, abs=1e-4)
        for key in ("train/loss", "valid/ic", "lr"):
            assert run.metric_history(key) == pytest.approx(other.metric_history(key), abs=1e-4)
        scores, expected_scores = (r.load_object("pred.pkl")["score"] for r in (run, other))
        assert scores.index.equals(expected_scores.index)
        assert scores.to_numpy() == pytest.approx(expected_scores.to_numpy(), abs=1e-5)
        assert run.load_object("params.pkl").fit_report_["fleet_members"] >= 3
    assert current_recorder() is None
    assert mlflow.active_run() is None


def test_a_failing_task_does_not_stop_the_others(store: str) -> None:
    tasks = [make_task(1), make_task(2, lr=1e38), make_task(3)]
    good, bad, other = FleetTrainer("fleet")(tasks)
    assert [r.status for r in (good, bad, other)] == ["FINISHED", "FAILED", "FINISHED"]
    assert "training loss of epoch 0" in bad.list_tags()["error"]


def test_a_dataset_of_several_tasks_is_checked_once(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs: list[Any] = []
    monkeypatch.setattr("qtorch.trainer.checks._check_dataset", configs.append)
    tasks = [make_task(1), make_task(2), make_task(3)]
    tasks[2]["dataset"]["step_len"] = 3
    FleetTrainer("fleet")(tasks)
    assert len(configs) == 2


def test_log_of_a_run_is_its_own(store: str) -> None:
    first, second = FleetTrainer("fleet")([make_task(1), make_task(2)])
    log = Path(first.download_artifact("run.log")).read_text()
    assert f"run {first.id}" in log
    assert f"run {second.id}" not in log
    assert "round 0: 2 members" in log


def test_mlflow_logs_to_the_run_of_its_job(store: str) -> None:
    from qtorch.model.fleet.fleet import Fleet
    from qtorch.trainer.run import task_train

    def train(seed: int) -> Any:
        recorder = task_train(make_task(seed), "fleet")
        with R.start(experiment_name="fleet", recorder_id=recorder.id, resume=True):
            mlflow.log_metric("own", seed)
        return recorder

    jobs = Fleet().run([lambda s=s: train(s) for s in (1, 2)])
    assert [job.error for job in jobs] == [None, None]
    for job, seed in zip(jobs, (1, 2), strict=True):
        assert R.get_recorder(recorder_id=job.result.id).list_metrics()["own"] == seed


def test_windows_of_a_study_are_members(store: str) -> None:
    task = make_task(1)
    studies = [
        rolling_study(task, trainer(name), step=20, cache=False, recorder_name=name)
        for name, trainer in (("fleet", FleetTrainer), ("single", TrainerR))
    ]
    assert len(studies[0].windows) > 2
    first, second = (study.prediction["score"] for study in studies)
    assert first.index.equals(second.index)
    assert first.to_numpy() == pytest.approx(second.to_numpy(), abs=1e-5)
    report = studies[0].windows[0].load_object("params.pkl").fit_report_
    assert report["fleet_members"] == len(studies[0].windows)
