"""`runner=fleet`: the jobs of a sweep, the windows of a study and the trials of a search."""

from __future__ import annotations

import pytest

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
