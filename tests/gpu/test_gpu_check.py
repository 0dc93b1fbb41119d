"""scripts/gpu_check.sh, small and on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Without those that start many further processes.
SECTIONS = [
    "machine", "networks", "twice", "speed", "graph", "fleet", "processes", "gather", "features",
]  # fmt: skip


@pytest.mark.slow
def test_dry_run_of_the_check_writes_both_reports(tmp_path: Path) -> None:
    environment = {**os.environ, "QTORCH_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    script = str(ROOT / "scripts" / "gpu_check.sh")
    command = ["bash", script, "--dry-run", "--only", ",".join(SECTIONS), "--out", "report"]
    process = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400,
        check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-2000:]
    report = json.loads((tmp_path / "report" / "gpu_check.json").read_text())
    assert "failed" not in report
    networks = {row["network"]: row for row in report["networks"]}
    assert networks.keys() == {"lstm", "gats"}
    difference = "difference from the CPU (standard deviations)"
    assert all(row[difference] == 0 and row["waits in steps"] == 0 for row in networks.values())
    assert all(
        row["equal weights"] and row["equal metrics"] for row in report["the same fit twice"]
    )
    (speed,) = report["samples per second"]
    assert speed["fit"] > 0
    assert speed["by hand"] > 0
    (graph,) = report["CUDA graph of the step"]
    assert graph["graph"] == "not used: there is no GPU"
    assert graph["difference of weights"] == 0
    (processes,) = report["processes"]
    assert processes["all"] > processes["slowest"] > 0
    assert report["Alpha158"][0]["value"] == 0
    table = (tmp_path / "report" / "gpu_check.md").read_text()
    assert table in process.stdout
    assert all(f"## {section}" in table for section in report)


@pytest.mark.slow
def test_the_check_needs_a_device_without_a_dry_run(tmp_path: Path) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "gpu" / "check.py")],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert process.returncode == 1
    assert "no CUDA device" in process.stdout
    assert not list(tmp_path.iterdir())
