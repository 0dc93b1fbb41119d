"""Tests that a training that is killed fifty times equals an uninterrupted one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from killed_runs import compare_rounds

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
    compare_rounds(tmp_path, report["rounds"])
