"""Stores for tests of tracking: one migration a session, a fresh store a test."""

from __future__ import annotations

import functools
import os
import sqlite3
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from qtorch.core.session import init
from qtorch.tracking import current

KEPT_TABLES = {"alembic_version", "experiments", "workspaces", "sqlite_sequence"}


@pytest.fixture(scope="session", autouse=True)
def one_schema() -> Iterator[None]:
    """MLflow reads its 67 migrations for each store that it opens: once is enough here."""
    import mlflow.store.db.utils as schema

    with pytest.MonkeyPatch.context() as patch:
        read = functools.cache(schema._get_latest_schema_revision)
        patch.setattr(schema, "_get_latest_schema_revision", read)
        yield


@pytest.fixture(autouse=True)
def quiet_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test waits long, and none leaves a run behind."""
    monkeypatch.setenv("QTORCH_TRACKING_PATIENCE", "1")
    monkeypatch.chdir(tmp_path)
    yield
    left = current.all_running()
    for recorder in left:
        recorder.end_run("KILLED")
    assert not left


@pytest.fixture(scope="session")
def shared_store(tmp_path_factory: pytest.TempPathFactory, template_cache: Path) -> Path:
    return tmp_path_factory.mktemp("store") / "mlflow.db"


@pytest.fixture
def uri(shared_store: Path) -> Iterator[str]:
    """An empty sqlite store, the default: one file, emptied after use, since opening is slow."""
    uri = f"sqlite:///{shared_store}"
    init(tracking_uri=uri)
    yield uri
    if shared_store.exists():
        with closing(sqlite3.connect(shared_store, timeout=20)) as connection, connection:
            rows = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            for name in {name for (name,) in rows} - KEPT_TABLES:
                connection.execute(f"DELETE FROM {name}")
            connection.execute("DELETE FROM experiments WHERE experiment_id > 0")


@pytest.fixture
def outbox_folder(tmp_path: Path) -> Path:
    return tmp_path / "outbox"


@pytest.fixture
def fork() -> Iterator[Callable[[Callable[[], object]], int]]:
    """Run a function in a forked process, which ends without pytest's clean-up; its pid."""
    children: list[int] = []

    def start(function: Callable[[], object]) -> int:
        pid = os.fork()
        if pid:
            children.append(pid)
            return pid
        try:
            function()
        except SystemExit as end:
            os._exit(int(end.code or 0))
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
            os._exit(99)
        os._exit(0)

    yield start
    for pid in children:
        try:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            continue
