"""A toy market for tests of training, with one CPU thread so that results are bit-identical."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from toy_training import ToyDataset, ToyRecorder


@pytest.fixture(autouse=True)
def use_single_thread(single_thread: None) -> None:
    """Make results bit-identical."""


@pytest.fixture(scope="session")
def dataset() -> ToyDataset:
    return ToyDataset()


@pytest.fixture
def recorder(tmp_path: Path) -> ToyRecorder:
    folder = tmp_path / "run"
    folder.mkdir()
    return ToyRecorder(folder)


@pytest.fixture
def rank_processes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Make ranks forked processes; return the list of those that fits have started."""
    from forked_ranks import ForkedRank

    import qtorch.model.devices.ranks

    processes: list[Any] = []

    class RecordedRank(ForkedRank):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            processes.append(self)

    monkeypatch.setattr(qtorch.model.devices.ranks, "RankProcess", RecordedRank)
    return processes
