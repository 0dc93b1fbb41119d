"""Killed with -9 at fifty moments, a task ends as if nothing had been."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pandas as pd
import pytest
import torch

from qtorch import R

STEPS = Path(__file__).parent / "kill_steps.py"


def points(database: Path, run_id: str) -> list[tuple[str, int, float]]:
    """Every point of a run's metrics in MLflow's own table, where one may stand twice."""
    with closing(sqlite3.connect(database)) as connection:
        query = "SELECT key, step, value FROM metrics WHERE run_uuid = ? ORDER BY key, step"
        found = connection.execute(query, (run_id,)).fetchall()
    assert len({(key, step) for key, step, _ in found}) == len(found)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "devices"), [(50, 1), (10, 2)])
def test_kills_change_nothing(tmp_path: Path, kills: int, devices: int) -> None:
    done = subprocess.run(
        [sys.executable, str(STEPS), str(tmp_path), str(kills), str(devices)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert sum(told["kills"].values()) == kills
    stages = {"training", "validation", "checkpoint", "saving", "record", "scoring"}
    inside = {stage: len(changes) for stage, changes in told["inside"].items()}
    if devices == 1:
        assert stages <= told["kills"].keys()
        assert inside["checkpoint"] >= 5
        assert inside["saving"] + inside["record"] >= 5
    else:
        assert {0, 1} == set(told["ranks"])
    with R.uri_context(f"sqlite:///{tmp_path / 'runs.db'}"):
        for which in ("whole", "killed"):  # one run a task, however often it was killed
            found = R.list_recorders(experiment_name=which)
            assert set(found) == {each[which] for each in told["rounds"]}
            assert {r.status for r in found.values()} == {"FINISHED"}
        for each in told["rounds"]:
            whole, killed = (R.get_recorder(recorder_id=each[w]) for w in ("whole", "killed"))
            weights = [r.load_object("params.pkl").network_.state_dict() for r in (whole, killed)]
            assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
            logged = [points(tmp_path / "runs.db", each[w]) for w in ("whole", "killed")]
            assert logged[0] == logged[1]
            assert [step for key, step, _ in logged[0] if key == "valid/loss"] == [0, 1, 2, 3]
            scores = [r.load_object("pred.pkl") for r in (whole, killed)]
            pd.testing.assert_frame_equal(*scores, check_exact=True)
