"""Opens the database of a study; one process at a time creates Optuna's tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optuna
import sqlalchemy
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial

from qtorch.core.errors import ConfigError
from qtorch.tracking.locations import redact_password, sqlite_path
from qtorch.tracking.trials.sampler import suppress_warnings
from qtorch.tracking.trials.trial import (
    POSTGRES,
    SCHEMA,
    SCHEMA_OPTION,
    make_sqlite_folder,
    study_lock,
)

StaleTrialCallback = Callable[[optuna.Study, FrozenTrial], None]


def open_storage(
    url: str, *, grace: float = 60.0, on_stale_trial: StaleTrialCallback | None = None
) -> RDBStorage:
    """Open a study's database and create Optuna's tables; one process at a time does so."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    make_sqlite_folder(url)
    is_sqlite = sqlite_path(url) is not None
    options: dict[str, Any] = (
        {"connect_args": {"timeout": 60}} if is_sqlite else {"pool_pre_ping": True}
    )
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
        raise ConfigError(
            f"cannot open the study's storage {redact_password(url)}: {error}"
        ) from error


def _make_schema(url: str) -> None:
    engine = sqlalchemy.create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("SELECT pg_advisory_xact_lock(7)")
        connection.exec_driver_sql(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}")
    engine.dispose()
