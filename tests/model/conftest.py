"""The toy market for tests of training; one thread, so that numbers are the same bit for bit."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from toy_training import ToyDataset, ToyRecorder


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def dataset() -> ToyDataset:
    return ToyDataset()


@pytest.fixture
def recorder(tmp_path: Path) -> ToyRecorder:
    folder = tmp_path / "run"
    folder.mkdir()
    return ToyRecorder(folder)


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Ranks are forked; those that a fit has started."""
    from forked_ranks import ForkedRank

    import qtorch.model.ranks

    started: list[Any] = []

    class Kept(ForkedRank):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            started.append(self)

    monkeypatch.setattr(qtorch.model.ranks, "RankProcess", Kept)
    return started
