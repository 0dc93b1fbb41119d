"""Fixtures for the study tests: a temporary store, and tasks that train in seconds."""

from __future__ import annotations

from typing import Any

import pytest

import qtorch

SOURCE = {
    "_target_": "qtorch.data.SyntheticSource",
    "num_instruments": 12,
    "num_sectors": 3,
    "start_time": "2018-01-01",
    "end_time": "2019-06-28",
    "signal": 0.3,
    "seed": 0,
}
SEGMENTS = {
    "train": ["2018-02-01", "2018-09-28"],
    "valid": ["2018-10-01", "2018-12-31"],
    "test": ["2019-01-01", "2019-05-31"],
}


@pytest.fixture
def store(tmp_path, monkeypatch) -> str:
    """The URI of a temporary sqlite store."""
    uri = f"sqlite:///{tmp_path}/runs.db"
    monkeypatch.chdir(tmp_path)
    qtorch.init(tracking_uri=uri)
    return uri


@pytest.fixture
def make_task():
    """`make_task(network=..., epochs=..., **overrides)`: a task with a small network."""

    def make(epochs: int = 1, network: Any = None, **overrides: Any) -> dict[str, Any]:
        handler = {
            "_target_": "qtorch.data.Alpha158",
            "source": SOURCE,
            "instruments": "stocks",
            "end_time": "2019-03-29",
            "columns": ["KMID", "KLEN", "ROC5", "MA5", "STD5"],
            "infer_processors": [
                {"class": "ZScoreNorm", "kwargs": {"fields_group": "feature"}},
                {"class": "Fillna", "kwargs": {"fields_group": "feature"}},
            ],
        }
        dataset = {"_target_": "qtorch.data.DatasetH", "handler": handler, "segments": SEGMENTS}
        model = {
            "_target_": "qtorch.model.LightningModel",
            "network": network or {"_target_": "qtorch.nn.MLP", "layers": [4]},
            "optimizer": {"_target_": "torch.optim.Adam", "_partial_": True, "lr": 0.01},
            "batch": {"size": 256},
            "trainer": {"max_epochs": epochs, "accelerator": "cpu"},
        }
        task = {"model": model, "dataset": dataset, "record": ["SignalRecord", "SigAnaRecord"]}
        return {**task, "seed": 3, **overrides}

    return make
