"""A fresh sqlite store, made whole before anybody sees it.

MLflow migrates a fresh file in place, for seconds, and processes that do so at once corrupt it.
Here one process does it under a lock, in a file beside, which then takes the store's name. The
migrated file is kept as a template in the user's cache, so that the next store is a copy.
"""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from qtorch.core.errors import TrackingError
from qtorch.tracking.locations import cache_folder, file_lock

log = logging.getLogger(__name__)

BUSY_SECONDS = 20.0


def ensure_sqlite_store(path: Path, version: str, migrate: Callable[[Path], None]) -> None:
    """Make `path` a store unless it is one; safe under many processes at once.

    `version` names MLflow and its schema; `migrate(file)` builds the tables in an empty file.
    """
    try:
        if _is_store(path):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(path.with_name(path.name + ".lock")):
            if _is_store(path):
                return
            if path.exists() and path.stat().st_size:
                migrate(path)  # tables of something else, or of a store that was cut short
            else:
                _build(path, version, migrate)
    except (OSError, sqlite3.Error) as error:
        raise TrackingError(
            f"the tracking store {path} cannot be opened or made: {error}. Give a file that can "
            "be written, or another tracking URI."
        ) from error


def _is_store(path: Path) -> bool:
    if not path.exists() or not path.stat().st_size:
        return False
    with closing(sqlite3.connect(path, timeout=BUSY_SECONDS)) as connection:
        rows = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        if not {"alembic_version", "experiments", "runs"} <= {name for (name,) in rows}:
            return False
        first = connection.execute("SELECT 1 FROM experiments WHERE experiment_id = 0")
        return first.fetchone() is not None


def _build(path: Path, version: str, migrate: Callable[[Path], None]) -> None:
    for stale in path.parent.glob(f".{path.name}.init-*"):
        stale.unlink(missing_ok=True)  # of a process that was killed here
    fresh = path.with_name(f".{path.name}.init-{os.getpid()}")
    template = cache_folder() / f"mlflow-{version}.db"
    try:
        if not _copied(template, fresh):
            log.info("making the tracking store %s (once; some seconds)", path)
            migrate(fresh)
            _keep_template(fresh, template)
        _move_default_experiment(fresh, path.parent / "artifacts" / "Default")
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def _copied(template: Path, fresh: Path) -> bool:
    """Copy the template; False, and the template gone, where it is not whole."""
    if not template.exists():
        return False
    try:
        shutil.copyfile(template, fresh)
        with closing(sqlite3.connect(fresh)) as connection:
            whole = connection.execute("PRAGMA quick_check").fetchone() == ("ok",)
        if whole and _is_store(fresh):
            return True
    except (OSError, sqlite3.Error) as error:
        log.debug("the template %s is of no use: %s", template, error)
    fresh.unlink(missing_ok=True)
    template.unlink(missing_ok=True)
    return False


def _keep_template(fresh: Path, template: Path) -> None:
    partial = template.with_name(f".{template.name}.{os.getpid()}")
    try:
        template.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(fresh, partial)
        os.replace(partial, template)
    except OSError as error:
        partial.unlink(missing_ok=True)
        log.debug("no template of the store is kept in %s: %s", template.parent, error)


def _move_default_experiment(fresh: Path, artifacts: Path) -> None:
    with closing(sqlite3.connect(fresh)) as connection, connection:
        connection.execute(
            "UPDATE experiments SET artifact_location = ?, creation_time = CAST(strftime('%s') AS "
            "INTEGER) * 1000, last_update_time = CAST(strftime('%s') AS INTEGER) * 1000",
            (str(artifacts),),
        )
