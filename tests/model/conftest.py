"""A toy market for tests of training, with one CPU thread so that results are bit-identical."""

from __future__ import annotations

import sys
from collections.abc import Iterator
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
def rank_processes() -> Iterator[list[Any]]:
    """Fork ranks from this process; return the list of those that fits have started."""
    from forked_ranks import fork_ranks_in_place, start_ranks_as_usual

    processes: list[Any] = []
    fork_ranks_in_place(processes)
    yield processes
    start_ranks_as_usual()
