"""Tests of commands that torchrun starts on every rank."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

TRAIN = ("qtorch.cli.main", "train", "debug=tiny", "trainer.accelerator=cpu", "record=none")
FRAGILE = """
import os
from torch import nn

class Fragile(nn.Module):
    def __init__(self, d_feat: int, fails: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(d_feat, 1)
        self.fails = fails

    def forward(self, x):
        if self.fails and os.environ.get("RANK") == "1":
            raise ZeroDivisionError("a rank divides by zero")
        return self.linear(x[:, -1])
"""


def _torchrun(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path = os.pathsep.join(p for p in (str(folder), os.environ.get("PYTHONPATH")) if p)
    return subprocess.run(
        [sys.executable, *launcher, "-m", *TRAIN, *overrides],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


@pytest.mark.slow
def test_torchrun_trains_each_job_once_on_all_ranks(tmp_path: Path) -> None:
    """The rank that torchrun started as another process fails in the first job only."""
    (tmp_path / "fragile.py").write_text(FRAGILE)
    network = ("model=lightning", "+model.network._target_=fragile.Fragile")
    process = _torchrun(tmp_path, "-m", "trainer=ddp", *network, "+model.network.fails=true,false")
    assert process.returncode == 1, process.stderr[-3000:]
    assert "error: job 0: ZeroDivisionError: a rank divides by zero" in process.stderr
    assert "2 jobs, 1 failed, 1 finished" in process.stdout, process.stderr[-3000:]
    runs = re.findall(r"(FAILED|FINISHED) +([0-9a-f]{32})", process.stdout)
    assert [status for status, _ in runs] == ["FAILED", "FINISHED"]
    assert process.stderr.count("epoch 0: train/loss") == 1
    assert process.stdout.count("experiment debug") == 1
    assert not list(tmp_path.rglob(".ranks-*"))
    assert not [p for p in psutil.process_iter(["cmdline"]) if _mentions_folder(tmp_path, p)]


def _mentions_folder(folder: Path, process: psutil.Process) -> bool:
    return any(str(folder) in word for word in process.info["cmdline"] or ())
