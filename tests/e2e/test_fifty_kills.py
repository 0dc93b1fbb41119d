"""Tests that a training that is killed fifty times equals an uninterrupted one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from training_runs import metric_points

from qtorch import R

STEPS = Path(__file__).parent / "kill_steps.py"


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "devices"), [(50, 1), (10, 2)])
def test_killed_training_equals_an_uninterrupted_one(
    tmp_path: Path, kills: int, devices: int
) -> None:
    process = subprocess.run(
        [sys.executable, str(STEPS), str(tmp_path), str(kills), str(devices)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    report = json.loads(process.stdout.splitlines()[-1])
    assert sum(report["kills"].values()) == kills
    stages = {"training", "validation", "checkpoint", "saving", "record", "scoring"}
    inside = {stage: len(changes) for stage, changes in report["inside"].items()}
    if devices == 1:
        assert stages <= report["kills"].keys()
        assert inside["checkpoint"] >= 5
        assert inside["saving"] + inside["record"] >= 5
    else:
        assert {0, 1} == set(report["ranks"])
    with R.uri_context(f"sqlite:///{tmp_path / 'runs.db'}"):
        for experiment in ("whole", "killed"):  # one run per task, however often it was killed
            recorders = R.list_recorders(experiment_name=experiment)
            assert set(recorders) == {round_ids[experiment] for round_ids in report["rounds"]}
            assert {r.status for r in recorders.values()} == {"FINISHED"}
        for round_ids in report["rounds"]:
            reference_run, killed_run = (
                R.get_recorder(recorder_id=round_ids[w]) for w in ("whole", "killed")
            )
            weights = [
                r.load_object("params.pkl").network_.state_dict()
                for r in (reference_run, killed_run)
            ]
            assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
            histories = [
                metric_points(tmp_path / "runs.db", round_ids[w]) for w in ("whole", "killed")
            ]
            assert histories[0] == histories[1]
            assert [step for key, step in histories[0] if key == "valid/loss"] == [0, 1, 2, 3]
            scores = [r.load_object("pred.pkl") for r in (reference_run, killed_run)]
            pd.testing.assert_frame_equal(*scores, check_exact=True)
