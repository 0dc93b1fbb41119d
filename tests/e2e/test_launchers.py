"""One command for each rank: torchrun starts them, one of them does the work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TRAIN = ("qtorch.cli.main", "train", "debug=tiny", "trainer.accelerator=cpu", "model=mlp")


def _torchrun(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [sys.executable, *launcher, "-m", *TRAIN, *overrides],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_torchrun_trains_once_on_all_its_processes(tmp_path: Path) -> None:
    done = _torchrun(tmp_path, "trainer=ddp", "record=none")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("epoch 0: train/loss") == 1
    assert done.stdout.count("experiment debug") == 1
    assert not list(tmp_path.rglob(".ranks-*"))
