"""What every test shares: quiet libraries, a folder of its own, no session left behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("MPLBACKEND", "Agg")

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a part which is not here say which."""
    for item in items:
        if item.get_closest_marker("qlib") and not os.environ.get("QTORCH_QLIB_PYTHON"):
            item.add_marker(
                pytest.mark.skip(reason="QTORCH_QLIB_PYTHON names no Python with pyqlib")
            )
        if item.get_closest_marker("gpu"):
            import torch

            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def own_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test begins with qtorch's defaults, whatever another one set."""
    from qtorch.core import session

    monkeypatch.setattr(session, "_process", session.Session())


@pytest.fixture(scope="session")
def market_data() -> Path:
    """The folder of real market data beside the repository; tests skip without it."""
    folder = Path(os.environ.get("QTORCH_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "qlib_nyse500").is_dir():
        pytest.skip("no real market data: QTORCH_TEST_DATA names no folder that holds qlib_nyse500")
    return folder


@pytest.fixture(scope="session")
def qlib_python() -> str:
    """A Python with pyqlib."""
    return os.environ["QTORCH_QLIB_PYTHON"]
