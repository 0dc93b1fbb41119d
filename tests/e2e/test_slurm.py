"""The check on a real SLURM, as a user starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECK = Path(__file__).resolve().parents[2] / "scripts" / "slurm_check.sh"
MISSING = 77  # the exit code where SLURM is not here and cannot be installed


@pytest.mark.slow
@pytest.mark.slurm
def test_what_a_cluster_takes_away_is_made_up_for(tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    done = subprocess.run(
        ["bash", str(CHECK), "--jobs", "8", "--epochs", "20", "--json", str(rows)],
        env={**os.environ, "QTORCH_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    if done.returncode == MISSING:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    held = json.loads(rows.read_text())
    assert len(held) == 12
    assert all(row[2] for row in held)
