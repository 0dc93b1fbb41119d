"""What the tracking store exchanges with its callers: errors, rows, valid values."""

from __future__ import annotations

import logging
import re
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

from qtorch.core.errors import ArgumentError, TrackingError

log = logging.getLogger(__name__)

MAX_PARAM, MAX_TAG, MAX_KEY = 6000, 8000, 250
_BAD_IN_KEY = re.compile(r"[^\w\-. :/]")
_logged_warnings: set[str] = set()


class NotInStoreError(TrackingError, ValueError):
    """The store has no experiment or run with that name or ID."""


class AlreadyInStoreError(TrackingError, ValueError):
    """The store already has an experiment with that name."""


class RefusedError(TrackingError):
    """The store rejected a request for good: sending it again later cannot succeed."""


@dataclass(frozen=True)
class ExperimentRow:
    """An experiment as the store returns it."""

    id: str
    name: str
    is_deleted: bool = False


@dataclass(frozen=True)
class RunRow:
    """A run as the store returns it; times are in milliseconds since 1970, UTC."""

    id: str
    name: str
    experiment_id: str
    status: str
    start_time: int | None
    end_time: int | None
    artifact_uri: str
    is_deleted: bool = False
    metrics: dict[str, float] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class MetricPoint:
    """One value of one metric; `time` is in milliseconds since 1970, UTC."""

    key: str
    value: float
    time: int
    step: int


def artifact_paths(local: Path, folder: str | None) -> dict[str, Path]:
    """Return `{path in the run: local file}` of a file, or of the content of a folder."""
    base = local if local.is_dir() else local.parent
    files = [p for p in local.rglob("*") if p.is_file()] if local.is_dir() else [local]
    return {str(PurePosixPath(folder or "", p.relative_to(base).as_posix())): p for p in files}


def now_ms() -> int:
    """Return the current time in milliseconds since 1970, UTC."""
    return time.time_ns() // 1_000_000


def format_local_time(milliseconds: int | None) -> str | None:
    """Format a time in milliseconds as text in this machine's time zone."""
    if milliseconds is None:
        return None
    return datetime.fromtimestamp(milliseconds / 1000).strftime("%Y-%m-%d %H:%M:%S")


def warn_once(message: str) -> None:
    """Log a warning unless this process has logged the same text before."""
    if message not in _logged_warnings and len(_logged_warnings) < 1000:
        _logged_warnings.add(message)
        log.warning(message)


def clean_key(name: str) -> str:
    """Turn a name into one that MLflow accepts: letters, digits and `_-. :/`, at most 250."""
    key = "/".join(p if p.strip(".") else "_" for p in _BAD_IN_KEY.sub("_", str(name)).split("/"))
    key = key[:MAX_KEY]
    if key != name:
        warn_once(f"{name!r} is logged as {key!r}: MLflow does not accept the original name")
    return key


def parse_metric_value(name: str, value: Any) -> float:
    """Convert a metric value to a float; raise ArgumentError if it is not a number."""
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ArgumentError(
            f"metric {name!r} is {value!r}; a metric must be one number."
        ) from error
