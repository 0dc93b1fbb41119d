"""Trials as plain values, their search space, and where they are stored; imports no Optuna."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from qtorch.core.errors import ConfigError
from qtorch.core.secrets import check_complete, redact_urls
from qtorch.core.session import resolve_path
from qtorch.tracking.locations import SQLITE, sqlite_path


@dataclass(frozen=True)
class TrialJob:
    """A trial that this process is to run, with its parameters."""

    number: int
    id: int
    params: dict[str, Any]
    retry: bool = False  # the trial failed before and its job is retried


@dataclass(frozen=True)
class TrialRow:
    """The state of a trial. The field names are stored in search.json, so they must not change."""

    number: int
    state: str
    value: float | None
    params: dict[str, Any] = field(default_factory=dict)
    run_id: str | None = None
    error: str | None = None
    steps: int = 0
    retry_of: int | None = None
    replaced: bool = False  # by a later trial with the same parameters


Value = str | int | float


@dataclass(frozen=True)
class Choice:
    """A choice between values, each written as in an override."""

    options: tuple[str, ...]


@dataclass(frozen=True)
class Span:
    """A number from `low` to `high`, both inclusive; whole numbers only if `integer`."""

    low: float
    high: float
    integer: bool = False
    log: bool = False
    step: float | None = None

    def grid(self) -> list[Value] | None:
        """Return all values of the range; None if it is continuous or logarithmic."""
        step = self.step if self.step is not None or not self.integer else 1
        if step is None or self.log:
            return None
        number = int((self.high - self.low) / step + 1e-9) + 1
        values = [self.low + k * step for k in range(number)]
        return [int(v) for v in values] if self.integer else list(values)


Space = dict[str, Choice | Span]

POSTGRES = "postgresql"
SCHEMA = "optuna"
SCHEMA_OPTION = "options=" + quote(f"-csearch_path={SCHEMA}")


def storage_url(storage: str | None, tracking_uri: str) -> str:
    """Return the URL of the trials' database: `storage`, or one derived from the tracking URI.

    For `sqlite:///mlruns/mlflow.db` it is `mlruns/mlflow-optuna.db`, for PostgreSQL the schema
    `optuna` of the same database. An MLflow server's database is not accessible to clients, so
    then it is the file `mlruns/optuna.db` in the working folder. Raises ConfigError for any other
    kind of store.
    """
    if storage is not None:
        path = sqlite_path(str(storage))
        url = check_complete(str(storage), "the sweeper's storage")
        return url if path is None else f"{SQLITE}{path}"
    path = sqlite_path(tracking_uri)
    if path is not None:
        return f"{SQLITE}{path.with_name(f'{path.stem}-optuna.db')}"
    if tracking_uri.startswith(POSTGRES):
        separator = "&" if "?" in tracking_uri else "?"
        return f"{tracking_uri}{separator}{SCHEMA_OPTION}"
    if tracking_uri.startswith(("http://", "https://")):
        return f"{SQLITE}{resolve_path('mlruns/optuna.db')}"
    raise ConfigError(
        f"the tracking store {redact_urls(tracking_uri)} cannot store a study's trials: set "
        "hydra.sweeper.storage=postgresql+psycopg://... or sqlite:///study.db."
    )
