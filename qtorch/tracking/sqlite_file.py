"""Creation of a new sqlite store that becomes visible only when it is complete.

MLflow migrates a new file in place, which takes seconds, and processes that do so at the same time
corrupt it. Here one process migrates a temporary file next to the store, under a lock, and then
renames it. The migrated file is saved as a template in the user's cache folder, so that the next
store is a copy of it.
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
    """Create a store at `path` unless there is one; many processes may call this at once.

    `version` names MLflow's version and schema; `migrate(file)` creates the tables in an empty
    file.
    """
    try:
        if _is_store(path):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(path.with_name(path.name + ".lock")):
            if _is_store(path):
                return
            if path.exists() and path.stat().st_size:
                migrate(path)  # another program's tables, or a store left incomplete
            else:
                _build(path, version, migrate)
    except (OSError, sqlite3.Error) as error:
        raise TrackingError(
            f"the tracking store {path} cannot be opened or created: {error}. Use a file that can "
            "be written, or another tracking URI."
        ) from error


def _is_store(path: Path) -> bool:
    if not path.exists() or not path.stat().st_size:
        return False
    with closing(sqlite3.connect(path, timeout=BUSY_SECONDS)) as connection:
        rows = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        if not {"alembic_version", "experiments", "runs"} <= {name for (name,) in rows}:
            return False
        default_experiment = connection.execute("SELECT 1 FROM experiments WHERE experiment_id = 0")
        return default_experiment.fetchone() is not None


def _build(path: Path, version: str, migrate: Callable[[Path], None]) -> None:
    for leftover in path.parent.glob(f".{path.name}.init-*"):
        leftover.unlink(missing_ok=True)  # left by a process that was killed during the creation
    fresh = path.with_name(f".{path.name}.init-{os.getpid()}")
    template = cache_folder() / f"mlflow-{version}.db"
    try:
        if not _copy_template(template, fresh):
            log.info("creating the tracking store %s (once; takes some seconds)", path)
            migrate(fresh)
            _save_template(fresh, template)
        _move_default_experiment(fresh, path.parent / "artifacts" / "Default")
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def _copy_template(template: Path, fresh: Path) -> bool:
    """Copy the template; return False, and remove the template, if it is missing or damaged."""
    if not template.exists():
        return False
    try:
        shutil.copyfile(template, fresh)
        with closing(sqlite3.connect(fresh)) as connection:
            is_intact = connection.execute("PRAGMA quick_check").fetchone() == ("ok",)
        if is_intact and _is_store(fresh):
            return True
    except (OSError, sqlite3.Error) as error:
        log.debug("the template %s cannot be used: %s", template, error)
    fresh.unlink(missing_ok=True)
    template.unlink(missing_ok=True)
    return False


def _save_template(fresh: Path, template: Path) -> None:
    partial = template.with_name(f".{template.name}.{os.getpid()}")
    try:
        template.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(fresh, partial)
        os.replace(partial, template)
    except OSError as error:
        partial.unlink(missing_ok=True)
        log.debug("the template of the store could not be saved to %s: %s", template.parent, error)


def _move_default_experiment(fresh: Path, artifacts: Path) -> None:
    with closing(sqlite3.connect(fresh)) as connection, connection:
        connection.execute(
            "UPDATE experiments SET artifact_location = ?, creation_time = CAST(strftime('%s') AS "
            "INTEGER) * 1000, last_update_time = CAST(strftime('%s') AS INTEGER) * 1000",
            (str(artifacts),),
        )
