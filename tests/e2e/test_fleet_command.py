"""`runner=fleet`: the jobs of a sweep, the windows of a study and the trials of a search."""

from __future__ import annotations

import pytest
from training_runs import metric_points, wait_for_epoch

from qtorch.tracking.manager import R


@pytest.mark.slow
def test_sweep_as_a_fleet_equals_a_usual_one(train, folder) -> None:
    words = ("seed=1,2", "model.optimizer.lr=0.001,0.003")
    fleet = train("-m", "runner=fleet", *words, "experiment_name=fleet")
    assert fleet.code == 0, fleet.err
    assert "4 jobs, all finished" in fleet.out
    usual = train("-m", *words, "experiment_name=usual", "sweep.isolate=false")
    assert usual.code == 0, usual.err
    runs = {}
    for name in ("fleet", "usual"):
        recorders = R.list_recorders(experiment_name=name).values()
        runs[name] = {
            (r.list_params()["seed"], r.list_params()["model.optimizer.lr"]): r.list_metrics()
            for r in recorders
            if not r.name.startswith("sweep ")
        }
    assert len(runs["fleet"]) == 4
    for key, metrics in runs["usual"].items():
        assert runs["fleet"][key]["valid/loss"] == pytest.approx(metrics["valid/loss"], abs=1e-4)
    repeated_sweep = train("-m", "runner=fleet", *words, "experiment_name=fleet")
    assert "already finished" in repeated_sweep.err


def test_mistakes_are_said_before_anything_is_trained(train, qtorch_cli) -> None:
    line = train("-m", "runner=fleet", "hydra/launcher=joblib", "seed=1,2").error()
    assert "remove hydra/launcher" in line
    line = qtorch_cli("rolling", "runner=fleet", "debug=tiny", "warm_start=true").error()
    assert "warm_start" in line
    assert "fleet" in qtorch_cli("rolling", "runner=flet").error()


@pytest.mark.slow
def test_killed_fleet_is_resumed_by_the_same_command(
    start, train, runs, qtorch_cli, folder
) -> None:
    words = ("-m", "runner=fleet", "seed=0,1", "trainer.max_epochs=30", "callbacks=no_stop")
    words += ("model.network.hidden_size=8", "model.network.dropout=0.2", "record=none")

    def jobs(experiment: str = "debug"):
        return [r for r in runs(experiment) if not r.name.startswith("sweep ")]

    child = start("train", "debug=tiny", "log_level=WARNING", *words)
    wait_for_epoch(jobs, child, 1)
    child.kill()
    child.communicate()
    assert qtorch_cli("runs").out.count("KILLED") >= 2
    result = train(*words)
    assert result.code == 0, result.err
    assert result.out.count("(resumed)") == 2, result
    assert train(*words, "experiment_name=whole").code == 0
    database = folder / "mlruns" / "mlflow.db"
    points = {
        (name, run.list_params()["seed"]): metric_points(database, run.id)
        for name in ("debug", "whole")
        for run in jobs(name)
    }
    for seed in ("0", "1"):
        assert len([key for key, _ in points["debug", seed] if key == "valid/loss"]) == 30
        assert points["debug", seed] == points["whole", seed]
