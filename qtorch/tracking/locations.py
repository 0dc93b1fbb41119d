"""Locations of tracking data: store URI, artifact folder, outbox, and file locks."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from qtorch.core.errors import TrackingError
from qtorch.core.files import cache_folder as cache_folder
from qtorch.core.session import session

SQLITE = "sqlite:///"
ALLOW_FILE_STORE = "MLFLOW_ALLOW_FILE_STORE"
NAMED_STORES = ("databricks", "databricks-uc", "uc")  # MLflow's URIs that are bare words


def default_uri() -> str:
    """Return the default tracking URI: from `qtorch.init`, MLFLOW_TRACKING_URI, or a sqlite file.

    That file is `mlruns/mlflow.db` in the working folder; its artifacts are in
    `mlruns/artifacts`.
    """
    uri = session().tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    return resolve_uri(uri or f"{SQLITE}{Path('mlruns', 'mlflow.db').absolute()}")


def resolve_uri(uri: str | Path) -> str:
    """Make the path in a URI absolute, so that it stays valid when the working folder changes.

    Raises TrackingError for a bare folder: MLflow 3.13 and later reject such stores.
    """
    text = str(uri).strip()
    path = sqlite_path(text)
    if path is not None:
        _, question, query = text.partition("?")
        return f"{SQLITE}{path}{question}{query}"
    scheme = urlsplit(text).scheme
    if text in NAMED_STORES:
        return text
    if scheme in ("", "file") and os.environ.get(ALLOW_FILE_STORE, "").lower() != "true":
        folder = Path(unquote(urlsplit(text).path) if scheme else text).expanduser().absolute()
        raise TrackingError(
            f"the tracking URI {text!r} is a folder, which MLflow no longer supports as a store; "
            f"use '{SQLITE}{folder / 'mlflow.db'}' (`mlflow migrate-filestore` moves old runs)."
        )
    return text


def sqlite_path(uri: str) -> Path | None:
    """Return the absolute path of a sqlite URI's file; None for another store or one in memory."""
    if not uri.startswith(SQLITE):
        return None
    name = uri[len(SQLITE) :].partition("?")[0]
    if name in ("", ":memory:"):
        return None
    return Path(name).expanduser().absolute()


def redact_password(uri: str) -> str:
    """Replace the password in a URI by `***`, for logs, messages and files."""
    return re.sub(r"(://[^/@:]*):[^/@]*@", r"\1:***@", uri)


def local_folder(artifact_uri: str | None) -> Path | None:
    """Return the local folder of a run's artifact URI, None if it is on another machine."""
    if not artifact_uri:
        return None
    parts = urlsplit(artifact_uri)
    if parts.scheme == "file":
        return Path(unquote(parts.path))
    return Path(artifact_uri) if parts.scheme == "" else None


def outbox_folder() -> Path:
    """Return the folder for unconfirmed entries: QTORCH_OUTBOX, else one in the cache folder."""
    folder = os.environ.get("QTORCH_OUTBOX")
    return Path(folder).expanduser() if folder else cache_folder() / "outbox"


@contextmanager
def file_lock(path: Path, *, timeout: float = 120.0) -> Iterator[None]:
    """Hold an exclusive lock on the file `path` (flock, so that it is freed if the process dies).

    Raises TrackingError after `timeout` seconds, and if the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise TrackingError(f"cannot lock {path}: {error}") from error
    try:
        end = time.monotonic() + timeout
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise TrackingError(
                        f"could not lock {path} within {timeout:.0f} s: another process holds it."
                    ) from None
                time.sleep(0.02)
        yield
    finally:
        os.close(handle)


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
