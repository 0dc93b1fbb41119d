"""Where the trials of a search lie: beside the runs, in the tracking store's own database.

Optuna and MLflow both keep their schema's version in a table `alembic_version` and refuse a
database that holds the other's. So beside a sqlite store lies a second file, and in a PostgreSQL
database the trials have a schema of their own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from qtorch.core.errors import ConfigError
from qtorch.tracking.locations import SQLITE, file_lock, redacted, sqlite_path

POSTGRES = "postgresql"
SCHEMA = "optuna"
SCHEMA_OPTION = "options=" + quote(f"-csearch_path={SCHEMA}")
TURN_SECONDS = 120.0
PRUNED_TAG = "pruned"  # of a run that its search has stopped
TRIAL_VARIABLE = "QTORCH_TRIAL"  # which trial a job's process runs, as JSON


def storage_url(given: str | None, tracking_uri: str) -> str:
    """The URL of the trials' database: the given one, else the one that goes with the store.

    `sqlite:///mlruns/mlflow.db` has `mlruns/mlflow-optuna.db` beside it, a PostgreSQL store the
    schema `optuna`, an MLflow server (whose database only it can see) a file
    `mlruns/optuna.db` in the working folder. Raises ConfigError for a store of another kind.
    """
    if given is not None:
        path = sqlite_path(str(given))
        return str(given) if path is None else f"{SQLITE}{path}"
    path = sqlite_path(tracking_uri)
    if path is not None:
        return f"{SQLITE}{path.with_name(f'{path.stem}-optuna.db')}"
    if tracking_uri.startswith(POSTGRES):
        joint = "&" if "?" in tracking_uri else "?"
        return f"{tracking_uri}{joint}{SCHEMA_OPTION}"
    if tracking_uri.startswith(("http://", "https://")):
        return f"{SQLITE}{Path('mlruns', 'optuna.db').absolute()}"
    raise ConfigError(
        f"the tracking store {redacted(tracking_uri)} has no place for a study's trials: name a "
        "database, hydra.sweeper.storage=postgresql+psycopg://... or sqlite:///study.db."
    )


def make_place(url: str) -> None:
    """The folder of a sqlite file, where there is none yet."""
    path = sqlite_path(url)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)


@contextmanager
def turn(url: str, engine: Any = None) -> Iterator[bool]:
    """One process of a study at a time: who asks for a trial must see what the others have.

    By a lock file beside sqlite, by an advisory lock of PostgreSQL (`engine` is SQLAlchemy's);
    both end with the process. On other databases nothing is locked, and the block is told False:
    two processes that ask at one moment may run a trial more than was asked for.
    """
    path = sqlite_path(url)
    if path is not None:
        with file_lock(path.with_name(path.name + ".lock"), timeout=TURN_SECONDS):
            yield True
    elif url.startswith(POSTGRES) and engine is not None:
        key = int.from_bytes(hashlib.sha256(SCHEMA.encode()).digest()[:7], "big")
        with engine.connect() as connection:
            connection.exec_driver_sql(f"SELECT pg_advisory_lock({key})")
            try:
                yield True
            finally:
                connection.exec_driver_sql(f"SELECT pg_advisory_unlock({key})")
                connection.commit()
    else:
        yield False
