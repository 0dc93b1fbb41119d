"""Test that runs the check on a real SLURM cluster as a user does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECK = Path(__file__).resolve().parents[2] / "scripts" / "slurm_check.sh"
SLURM_MISSING = 77  # exit code if SLURM is missing and cannot be installed


@pytest.mark.slow
@pytest.mark.slurm
def test_slurm_check_script_passes(tmp_path: Path) -> None:
    rows_path = tmp_path / "rows.json"
    process = subprocess.run(
        ["bash", str(CHECK), "--jobs", "4", "--json", str(rows_path)],
        env={**os.environ, "QTORCH_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    if process.returncode == SLURM_MISSING:
        pytest.skip(process.stderr.strip().splitlines()[-1])
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-6000:]
    checks = json.loads(rows_path.read_text())
    assert len(checks) == 12
    assert all(row[2] for row in checks)
