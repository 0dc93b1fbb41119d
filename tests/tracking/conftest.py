"""Fixtures for the tracking tests: one migration per session, an empty store per test."""

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

from qtorch.core.session import set_defaults
from qtorch.tracking import recorder as current

TABLES_TO_KEEP = {"alembic_version", "experiments", "workspaces", "sqlite_sequence"}


@pytest.fixture(scope="session", autouse=True)
def schema_revision_cache() -> Iterator[None]:
    """Cache the schema revision: MLflow reads its 67 migrations for each store that it opens."""
    import mlflow.store.db.utils as schema

    with pytest.MonkeyPatch.context() as patch:
        read = functools.cache(schema._get_latest_schema_revision)
        patch.setattr(schema, "_get_latest_schema_revision", read)
        yield


@pytest.fixture(autouse=True)
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run each test in an empty folder with a short patience; fail if it leaves a run open."""
    monkeypatch.setenv("QTORCH_TRACKING_PATIENCE", "1")
    monkeypatch.chdir(tmp_path)
    yield
    open_recorders = current.running_recorders()
    for recorder in open_recorders:
        recorder.end_run("KILLED")
    assert not open_recorders


@pytest.fixture(scope="session")
def store_file(tmp_path_factory: pytest.TempPathFactory, template_cache: Path) -> Path:
    return tmp_path_factory.mktemp("store") / "mlflow.db"


@pytest.fixture
def uri(store_file: Path) -> Iterator[str]:
    """An empty sqlite store, set as the default. It is emptied after use: creation is slow."""
    uri = f"sqlite:///{store_file}"
    set_defaults(tracking_uri=uri)
    yield uri
    if store_file.exists():
        with closing(sqlite3.connect(store_file, timeout=20)) as connection, connection:
            rows = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            for name in {name for (name,) in rows} - TABLES_TO_KEEP:
                connection.execute(f"DELETE FROM {name}")
            connection.execute("DELETE FROM experiments WHERE experiment_id > 0")


@pytest.fixture
def outbox_folder(tmp_path: Path) -> Path:
    return tmp_path / "outbox"


@pytest.fixture
def fork() -> Iterator[Callable[[Callable[[], object]], int]]:
    """Run a function in a forked process that ends without pytest's clean-up; return its PID."""
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
