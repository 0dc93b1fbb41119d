"""Fixtures for the trainer tests: tasks with a fake model and dataset, and a temporary store."""

from __future__ import annotations

from typing import Any

import pytest

import qtorch

FAKES = "trainer_fakes"  # pytest puts this folder on sys.path


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch) -> str:
    """A temporary sqlite store; the fakes module is trusted, as a user's package would be."""
    uri = f"sqlite:///{tmp_path}/runs.db"
    monkeypatch.chdir(tmp_path)
    qtorch.init(tracking_uri=uri, trusted=[FAKES])
    return uri


@pytest.fixture
def make_task():
    """A function that builds a task: `make_task(seed=..., record=..., **model_arguments)`."""

    def make(seed: int | None = 3, record: Any = None, **model_kwargs: Any) -> dict[str, Any]:
        return {
            "model": {"class": "FakeModel", "module_path": FAKES, "kwargs": model_kwargs},
            "dataset": {"class": "FakeDataset", "module_path": FAKES, "kwargs": {"noise": 0.5}},
            "record": ["SignalRecord", "SigAnaRecord"] if record is None else record,
            "seed": seed,
        }

    return make


@pytest.fixture
def fakes() -> str:
    """The name of the fakes module, for `module_path`."""
    return FAKES
