"""Fixtures of all tests: no telemetry, an isolated tracking store, no session state left behind."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from qlib_server import write_launcher

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("MPLBACKEND", "Agg")

ROOT = Path(__file__).resolve().parents[1]
qlib_folder = pytest.StashKey[tempfile.TemporaryDirectory[str]]()

# Until all tests are collected. Modules and tests are a million objects that live to the end;
# garbage collections that look through them would take a third of the time.
gc.disable()


def pytest_configure(config: pytest.Config) -> None:
    """Let the tests, in all processes, share a server that has imported Qlib's libraries once."""
    qlib = os.environ.get("QTORCH_QLIB_PYTHON")
    if qlib and not hasattr(config, "workerinput"):
        folder = config.stash[qlib_folder] = tempfile.TemporaryDirectory(prefix="qlib-")
        os.environ["QTORCH_QLIB_PYTHON"] = str(write_launcher(Path(folder.name), qlib))


def pytest_unconfigure(config: pytest.Config) -> None:
    if qlib_folder in config.stash:
        config.stash[qlib_folder].cleanup()


def pytest_collection_finish() -> None:
    """Leave modules and tests out of garbage collections."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(tryfirst=True)  # before pytest selects by -m "not slow"
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest tests first; skip those whose requirements are missing, with a reason."""
    # A long test that is started last keeps one process busy while the others are idle.
    items.sort(key=lambda i: (not i.get_closest_marker("slurm"), "e2e" not in i.path.parts))
    qlib_missing = os.environ.get(
        "QTORCH_QLIB_MISSING", "QTORCH_QLIB_PYTHON is not set to a Python with pyqlib"
    )
    for item in items:
        if item.get_closest_marker("qlib"):
            item.add_marker(pytest.mark.slow)
            if not os.environ.get("QTORCH_QLIB_PYTHON"):
                item.add_marker(pytest.mark.skip(reason=qlib_missing))
        if item.get_closest_marker("gpu"):
            import torch

            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def reset_session(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Start each test with qtorch's defaults, whatever another test has set."""
    from qtorch.core import secrets, session
    from qtorch.process.stops import received_signals
    from qtorch.tracking.recorder import remove_running, running_recorders

    monkeypatch.setattr(session, "_process", session.Session())
    monkeypatch.setattr(secrets, "_urls", {})
    monkeypatch.delenv(secrets.URLS_VARIABLE, raising=False)
    yield
    received_signals.clear()
    # A run left open by this test must not leak into the next one.
    for recorder in running_recorders():
        remove_running(recorder)
        if recorder._deactivate is not None:
            recorder._deactivate()
    # A command's log handler writes to the stderr of this test, which ends with the test.
    logger = logging.getLogger("qtorch")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)
    # So does Hydra's, which it adds to the root logger.
    for handler in [h for h in logging.root.handlers if type(h) is logging.StreamHandler]:
        logging.root.removeHandler(handler)


@pytest.fixture(scope="session")
def template_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a cache folder for the session, with the MLflow templates of the user's cache.

    The first store that is created adds a missing template.
    """
    from qtorch.core.files import cache_folder

    folder = tmp_path_factory.mktemp("cache")
    for template in cache_folder().glob("mlflow-*.db"):
        shutil.copy(template, folder)
    return folder


@pytest.fixture(autouse=True)
def isolate_tracking(template_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep tests from writing outside their folders and from reading the user's settings."""
    monkeypatch.setenv("QTORCH_CACHE", str(template_cache))
    monkeypatch.setenv("QTORCH_OUTBOX", str(tmp_path / "outbox"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="session")
def fork_server() -> Iterator[Any]:
    """A fork server for the test session, which imports everything once."""
    from qtorch.process.fork_server import TRAINING_PRELOAD, ForkServer

    server = ForkServer("qtorch.cli.jobs.work", TRAINING_PRELOAD)
    yield server
    server.close()


@pytest.fixture
def session_fork_server(fork_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork the child processes of jobs and tasks from the session's fork server."""

    owner = os.getpid()

    class SharedServer(dict[Any, Any]):
        def setdefault(self, modules: Any, default: Any = None) -> Any:
            # A process that a test forks cannot use the server of another process.
            return fork_server if os.getpid() == owner else super().setdefault(modules, default)

    monkeypatch.setattr("qtorch.process.fork_server._servers", SharedServer())
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def single_thread() -> Iterator[None]:
    """Use one thread, as started processes do: equal results need equal numbers of threads."""
    import torch

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def market_data() -> Path:
    """Return the folder with real market data beside the repository; skip the test without it."""
    folder = Path(os.environ.get("QTORCH_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "qlib_nyse500").is_dir():
        pytest.skip("no real market data: QTORCH_TEST_DATA is not a folder with qlib_nyse500")
    return folder


@pytest.fixture(scope="session")
def qlib_python() -> str:
    """Return a Python interpreter with pyqlib."""
    return os.environ["QTORCH_QLIB_PYTHON"]


@pytest.fixture(scope="session")
def account_walk() -> Callable[..., tuple[pd.DataFrame, pd.DataFrame]]:
    """Return `account_walk(num_days=60, seed=0, bench=True)`: a portfolio's report and positions.

    The frames are those of PortAnaRecord for an account with random returns.
    Cash + value = account.
    """

    def walk(num_days: int = 60, seed: int = 0, bench: bool = True):
        rng = np.random.default_rng(seed)
        days = pd.bdate_range("2020-01-01", periods=num_days, name="datetime")
        gross = pd.Series(rng.normal(0.0012, 0.01, num_days), days)
        turnover = pd.Series(np.r_[0.9, rng.uniform(0.05, 0.15, num_days - 1)], days)
        cost = turnover * 0.0015
        account = 1e6 * (1 + gross - cost).cumprod()
        previous = account.shift(fill_value=1e6)
        names = [f"I{k}" for k in range(8)]
        share = pd.DataFrame(rng.dirichlet(np.full(8, 4.0), num_days) * 0.95, days, names)
        share = share.where(rng.random(share.shape) > 0.2, 0.0)
        value = account * share.sum(axis=1)
        report = pd.DataFrame(
            {
                "account": account,
                "return": gross,
                "total_turnover": (turnover * previous).cumsum(),
                "turnover": turnover,
                "total_cost": (cost * previous).cumsum(),
                "cost": cost,
                "value": value,
                "cash": account - value,
                "bench": rng.normal(0.0004, 0.008, num_days) if bench else np.nan,
            }
        )
        weights = share.stack().rename_axis(["datetime", "instrument"])
        weights = weights[weights > 0]
        worth = weights * account.reindex(weights.index.get_level_values(0)).to_numpy()
        positions = pd.DataFrame(
            {"amount": worth / 20, "price": 20.0, "count": 1, "weight": weights}
        )
        return report, positions

    return walk


class _Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.elements: list[dict[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append({"tag": tag, **{k: v or "" for k, v in attrs}})


@pytest.fixture(scope="session")
def elements() -> Callable[[str], list[dict[str, str]]]:
    """Return `elements(html)`: the attributes of every element, and its `tag`."""

    def parse(html: str) -> list[dict[str, str]]:
        parser = _Elements()
        parser.feed(html)
        return parser.elements

    return parse


@pytest.fixture
def quick_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Create the figures of report pages without drawing them, which would take seconds."""
    from qtorch.record.report import page

    monkeypatch.setattr(page, "_png", lambda figure: page.Png(b"picture", 1, 1))


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the figures of report pages, but write their files and page elements."""
    from qtorch.record.report import page

    def draw(self, name, chart, *args, **options):
        picture = page.Png(b"picture", 1, 1)
        (self.folder / f"{name}.png").write_bytes(picture.data)
        self.pictures[name] = page.Picture(name, picture, picture)

    monkeypatch.setattr(page.Page, "draw", draw)


@pytest.fixture(scope="session")
def browser_dom() -> Callable[..., str]:
    """Return `browser_dom(path)`: the DOM after Chromium has loaded a page; may skip the test."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is on the path")

    def dump(path: Path) -> str:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        command = [program, *options, f"--user-data-dir={path.parent / 'profile'}", "--dump-dom"]
        process = subprocess.run(
            [*command, path.as_uri()], capture_output=True, text=True, check=True, timeout=120
        )
        return process.stdout

    return dump
