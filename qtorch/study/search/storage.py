"""The database of a study: open it, and lock it against other processes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import optuna
import sqlalchemy
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial

from qtorch.core.errors import ConfigError
from qtorch.core.files import file_lock
from qtorch.core.secrets import redact_error, redact_urls
from qtorch.study.search.sampler import suppress_warnings
from qtorch.study.search.trial import POSTGRES, SCHEMA, SCHEMA_OPTION
from qtorch.tracking.locations import sqlite_path

LOCK_SECONDS = 120.0

StaleTrialCallback = Callable[[optuna.Study, FrozenTrial], None]


def open_storage(
    url: str, *, grace: float = 60.0, on_stale_trial: StaleTrialCallback | None = None
) -> RDBStorage:
    """Open a study's database and create Optuna's tables; one process at a time does so."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = sqlite_path(url)
    options: dict[str, Any] = {"pool_pre_ping": True}
    if path is not None:
        options = {"connect_args": {"timeout": 60}}
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with suppress_warnings():
            if url.startswith(POSTGRES) and SCHEMA_OPTION in url:
                _make_schema(url)
            with study_lock(url):
                return RDBStorage(
                    url,
                    engine_kwargs=options,
                    heartbeat_interval=max(1, int(grace / 4)),
                    grace_period=max(1, int(grace)),
                    heartbeat_stale_trial_callback=on_stale_trial,
                )
    except Exception as error:
        redact_error(error)
        raise ConfigError(f"cannot open the study's storage {redact_urls(url)}: {error}") from error


def _make_schema(url: str) -> None:
    engine = sqlalchemy.create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("SELECT pg_advisory_xact_lock(7)")
        connection.exec_driver_sql(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}")
    engine.dispose()


@contextmanager
def study_lock(url: str, engine: Any = None) -> Iterator[bool]:
    """Let one process at a time use the study, so that it sees the trials of the others.

    Uses a lock file next to a sqlite file, or an advisory lock of PostgreSQL (`engine` is an
    SQLAlchemy engine); both are released when the process dies. Other databases are not locked and
    the block gets False: two processes that ask at the same moment may run one trial too many.
    """
    path = sqlite_path(url)
    if path is not None:
        with file_lock(path.with_name(path.name + ".lock"), timeout=LOCK_SECONDS):
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
