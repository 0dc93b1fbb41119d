"""Compare the metrics logged by qtorch's PortAnaRecord with Qlib's."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pandas as pd

import qtorch
from qtorch import R
from qtorch.record import PortAnaRecord

CONFIG: dict[str, Any] = {
    "strategy": {
        "class": "TopkDropoutStrategy",
        "kwargs": {"signal": "<PRED>", "topk": 50, "n_drop": 5},
    },
    "executor": {
        "class": "SimulatorExecutor",
        "module_path": "qlib.backtest.executor",
        "kwargs": {"time_per_step": "day", "generate_portfolio_metrics": True},
    },
    "backtest": {
        "start_time": "2016-01-01",
        "end_time": "2016-12-30",
        "account": 1e8,
        "benchmark": "NYSE500EW",
        "exchange_kwargs": {
            "limit_threshold": 0.095,
            "deal_price": "close",
            "open_cost": 0.0005,
            "close_cost": 0.0015,
            "min_cost": 5,
        },
    },
}


def ask_qlib(python: str, provider: str, scores: pd.Series, folder: Path) -> dict[str, float]:
    """The metrics logged by Qlib's record."""
    path = folder / "portfolio_scores.pkl"
    scores.to_pickle(path)
    job = {"provider": provider, "scores": str(path), "config": CONFIG, "folder": str(folder)}
    (folder / "record.json").write_text(json.dumps(job))
    script = Path(__file__).with_name("qlib_portfolio_record.py")
    process = subprocess.run(
        [python, str(script), str(folder / "record.json")], capture_output=True, text=True
    )
    if process.returncode:
        raise RuntimeError(process.stderr[-3000:])
    lines = [line for line in process.stdout.splitlines() if line.startswith("{")]
    metrics: dict[str, float] = json.loads(lines[-1])
    return metrics


def run_qtorch(provider: str, scores: pd.Series, folder: Path) -> dict[str, float]:
    """The metrics logged by qtorch's record."""
    config = {**CONFIG, "backtest": {**CONFIG["backtest"], "as_qlib": True}}
    qtorch.init(provider_uri=provider, tracking_uri=f"sqlite:///{folder}/own.db")
    with R.start(experiment_name="parity"):
        recorder = R.get_recorder()
        recorder.save_objects(**{"pred.pkl": scores.to_frame("score")})
        PortAnaRecord(recorder, config).generate()
        metrics: dict[str, float] = recorder.list_metrics()
    return metrics
