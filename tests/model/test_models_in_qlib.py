"""Our models inside real Qlib: its workflows, records and recorder (scripts/workflows)."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "workflows" / "models_in_qlib.py"


@pytest.mark.qlib
def test_our_models_train_score_and_are_stored_inside_real_qlib(tmp_path, qlib_python):
    process = subprocess.run(
        [qlib_python, str(SCRIPT), str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stderr[-3000:]
    lines = [line for line in process.stdout.splitlines() if line.startswith('{"network"')]
    results = [json.loads(line) for line in lines]
    runs = {r["network"]: r for r in results if "IC" in r}
    assert set(runs) == {"LSTM", "GRU"}
    for result in runs.values():
        assert result["model"] == "qtorch.model.lightning_model.LightningModel"
        assert result["num_days"] == 132  # a backtest of Qlib's on the scores
        assert result["is_same_index"]
        assert result["difference"] == 0  # of the scores of the stored model in another process
        assert -1 < result["IC"] < 1
    weighted = next(r for r in results if "reweighter" in r)
    assert min(weighted["num_samples"]) > 1000  # train and valid, as Qlib's models ask it
    assert weighted["change_of_scores"] > 1e-3
