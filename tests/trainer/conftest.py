"""Tasks of fake parts, in a store of their own."""

from __future__ import annotations

from typing import Any

import pytest

import qtorch

FAKES = "trainer_fakes"  # pytest puts this folder on sys.path


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch) -> str:
    """A sqlite store of this test's own; the fakes are trusted, as a user's package would be."""
    uri = f"sqlite:///{tmp_path}/runs.db"
    monkeypatch.chdir(tmp_path)
    qtorch.init(tracking_uri=uri, trusted=[FAKES])
    return uri


@pytest.fixture
def make_task():
    """`make_task(seed=..., record=..., **arguments of the model)`."""

    def make(seed: int | None = 3, record: Any = None, **model: Any) -> dict[str, Any]:
        return {
            "model": {"class": "FakeModel", "module_path": FAKES, "kwargs": model},
            "dataset": {"class": "FakeDataset", "module_path": FAKES, "kwargs": {"noise": 0.5}},
            "record": ["SignalRecord", "SigAnaRecord"] if record is None else record,
            "seed": seed,
        }

    return make


@pytest.fixture
def fakes() -> str:
    """The module of the fake parts, for `module_path`."""
    return FAKES
