"""What every test shares: quiet libraries, a folder of its own, no session left behind."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
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
def own_session(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test begins with qtorch's defaults, whatever another one set."""
    from qtorch.core import session

    monkeypatch.setattr(session, "_process", session.Session())
    yield
    # A command writes its log to the stderr of its time, which ends with the test.
    logger = logging.getLogger("qtorch")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def template_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the session that the first store fills, from the user's where that has one."""
    from qtorch.tracking.locations import cache_folder

    folder = tmp_path_factory.mktemp("cache")
    for template in cache_folder().glob("mlflow-*.db"):
        shutil.copy(template, folder)
    return folder


@pytest.fixture(autouse=True)
def quiet_tracking(template_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test writes outside its folders, none reads the user's settings."""
    monkeypatch.setenv("QTORCH_CACHE", str(template_cache))
    monkeypatch.setenv("QTORCH_OUTBOX", str(tmp_path / "outbox"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


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
