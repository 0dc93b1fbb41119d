"""The toy market for tests of training; one thread, so that numbers are the same bit for bit."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

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
