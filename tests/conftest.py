"""What every test shares: quiet libraries, a folder of its own, no session left behind."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
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
    from qtorch.core.stops import noted
    from qtorch.tracking.current import all_running, make_past

    monkeypatch.setattr(session, "_process", session.Session())
    yield
    noted.clear()
    for left in all_running():  # a run that a test leaves open is no other one's
        make_past(left)
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
def zygote() -> Iterator[Any]:
    """The process that jobs are forked from, its imports done once for the session."""
    from qtorch.task.forked import TRAINING, Forks

    forks = Forks(*TRAINING, "qtorch.cli.work")
    yield forks
    forks.close()


@pytest.fixture
def warm(zygote: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs and tasks in processes of their own are forked from the session's zygote."""

    class Shared:
        address, stopped, busy, open = zygote.address, False, False, True
        call = zygote.call

        def __init__(self, *modules: str) -> None:
            type(self).open = True

        def close(self) -> None:
            type(self).open = False

    from qtorch.cli import isolation, sweep_start
    from qtorch.trainer import isolated

    for module in (sweep_start, isolation, isolated):
        monkeypatch.setattr(module, "Forks", Shared)
    monkeypatch.setattr(isolation, "_forks", [])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


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


@pytest.fixture(scope="session")
def account_walk() -> Callable[..., tuple[pd.DataFrame, pd.DataFrame]]:
    """`account_walk(num_days=60, seed=0, bench=True)`: a portfolio's report and positions.

    The frames of PortAnaRecord, of an account that wanders; cash + value = account.
    """

    def walk(num_days: int = 60, seed: int = 0, bench: bool = True):
        rng = np.random.default_rng(seed)
        days = pd.bdate_range("2020-01-01", periods=num_days, name="datetime")
        gross = pd.Series(rng.normal(0.0012, 0.01, num_days), days)
        turnover = pd.Series(np.r_[0.9, rng.uniform(0.05, 0.15, num_days - 1)], days)
        cost = turnover * 0.0015
        account = 1e6 * (1 + gross - cost).cumprod()
        before = account.shift(fill_value=1e6)
        names = [f"I{k}" for k in range(8)]
        share = pd.DataFrame(rng.dirichlet(np.full(8, 4.0), num_days) * 0.95, days, names)
        share = share.where(rng.random(share.shape) > 0.2, 0.0)
        value = account * share.sum(axis=1)
        report = pd.DataFrame(
            {
                "account": account,
                "return": gross,
                "total_turnover": (turnover * before).cumsum(),
                "turnover": turnover,
                "total_cost": (cost * before).cumsum(),
                "cost": cost,
                "value": value,
                "cash": account - value,
                "bench": rng.normal(0.0004, 0.008, num_days) if bench else np.nan,
            }
        )
        held = share.stack().rename_axis(["datetime", "instrument"])
        held = held[held > 0]
        worth = held * account.reindex(held.index.get_level_values(0)).to_numpy()
        positions = pd.DataFrame({"amount": worth / 20, "price": 20.0, "count": 1, "weight": held})
        return report, positions

    return walk


class _Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[dict[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append({"tag": tag, **{k: v or "" for k, v in attrs}})


@pytest.fixture(scope="session")
def elements() -> Callable[[str], list[dict[str, str]]]:
    """`elements(html)`: every element's attributes, with its `tag`."""

    def parse(html: str) -> list[dict[str, str]]:
        parser = _Elements()
        parser.feed(html)
        return parser.found

    return parse


@pytest.fixture
def quick_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages whose figures are made but not drawn, which is what takes seconds."""
    from qtorch.record import page

    monkeypatch.setattr(page, "_png", lambda figure: page._Png(b"picture", 'width="1"'))


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages whose figures are not even made: their places and files are."""
    from qtorch.record import page

    def picture(self, name, draw, *data, says, **options):
        (self.folder / f"{name}.png").write_bytes(b"picture")
        return f'<figure id="{name}"><img src="data:," alt="{says}"></figure>'

    monkeypatch.setattr(page.Page, "picture", picture)


@pytest.fixture(scope="session")
def in_browser() -> Callable[..., str]:
    """`in_browser(path)`: the DOM after Chromium has loaded it; skips where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is on the path")

    def dump(path: Path) -> str:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        command = [program, *options, f"--user-data-dir={path.parent / 'profile'}", "--dump-dom"]
        done = subprocess.run(
            [*command, path.as_uri()], capture_output=True, text=True, check=True, timeout=120
        )
        return done.stdout

    return dump
