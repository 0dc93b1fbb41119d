"""The database of a study: Optuna's tables, made by one process at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optuna
import sqlalchemy
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial

from qtorch.core.errors import ConfigError
from qtorch.tracking.locations import redacted, sqlite_path
from qtorch.tracking.trials.parts import quiet
from qtorch.tracking.trials.place import POSTGRES, SCHEMA, SCHEMA_OPTION, make_place, turn

Stale = Callable[[optuna.Study, FrozenTrial], None]


def open_storage(url: str, *, grace: float = 60.0, stale: Stale | None = None) -> RDBStorage:
    """Optuna's tables, made by one process at a time."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    make_place(url)
    local = sqlite_path(url) is not None
    options: dict[str, Any] = (
        {"connect_args": {"timeout": 60}} if local else {"pool_pre_ping": True}
    )
    try:
        with quiet():
            if url.startswith(POSTGRES) and SCHEMA_OPTION in url:
                _make_schema(url)
            with turn(url):
                return RDBStorage(
                    url,
                    engine_kwargs=options,
                    heartbeat_interval=max(1, int(grace / 4)),
                    grace_period=max(1, int(grace)),
                    heartbeat_stale_trial_callback=stale,
                )
    except Exception as error:
        raise ConfigError(f"the study's storage {redacted(url)} cannot be used: {error}") from error


def _make_schema(url: str) -> None:
    engine = sqlalchemy.create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("SELECT pg_advisory_xact_lock(7)")
        connection.exec_driver_sql(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}")
    engine.dispose()
