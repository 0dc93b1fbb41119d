"""The interface of the stores of task pools, queries, and retries while a store is unavailable.

A further store is a subclass of `Store` in its own module and an entry of `STORES`.
"""

from __future__ import annotations

import logging
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from qtorch.core.errors import (
    ConfigError,
    TaskStoreError,
    TaskStoreVersionError,
    unknown_name_message,
)
from qtorch.core.trust import locate
from qtorch.task.definition import Definition, definition_hash, query_token

log = logging.getLogger(__name__)

T = TypeVar("T")
Row = dict[str, Any]

# The store of each URL scheme. A module is imported when its store is opened.
STORES = {
    "sqlite": "qtorch.task.stores.sql.SqlStore",
    "postgresql": "qtorch.task.stores.sql.SqlStore",
    "postgres": "qtorch.task.stores.sql.SqlStore",
    "mongodb": "qtorch.task.stores.mongo.MongoStore",
}
URL_FORMS = "sqlite:///FILE, postgresql+psycopg://USER@HOST/DATABASE or mongodb://HOST/DATABASE"
SCHEMA_VERSION = 1
TASKS, SCHEMA = "qtorch_tasks", "qtorch_task_schema"  # names of the tables or collections
MAX_LEASE_SECONDS = 1e9  # a deadline that is further away is not one of ours
MAX_COUNT = 2**62  # of a column that is counted up; at most half of what stores can hold
MAX_PAUSE_SECONDS = 5.0
LOG_SECONDS = 30.0  # between two warnings about an unavailable store

WAITING, RUNNING, PART_DONE, DONE, FAILED = "waiting", "running", "part_done", "done", "failed"
STATUSES = (WAITING, RUNNING, PART_DONE, DONE, FAILED)
PREFIXES = ("def.", "filter.")
WHOLE_DEFINITION = ("def", "filter")


@dataclass(frozen=True)
class Condition:
    """A parsed query. None is no restriction; an empty tuple matches nothing.

    `tokens` consists of groups; a definition must have at least one token of each group.
    """

    ids: tuple[str, ...] | None = None
    statuses: tuple[str, ...] | None = None
    hashes: tuple[str, ...] | None = None
    tokens: tuple[tuple[str, ...], ...] = ()


class StoreUnavailable(Exception):
    """A temporary failure: the store is locked or does not answer; a retry may succeed."""


class StoreTimeout(TaskStoreError):
    """The store was unavailable for longer than the caller was ready to wait."""


class StoreFileLost(TaskStoreError):
    """The store's file was deleted or replaced while it was open."""


class ValueTooLarge(TaskStoreError):
    """The store cannot hold a value of this size."""


@dataclass(frozen=True)
class Change:
    """An update of a row: `values` are set, `steps` are added, `lease` sets the deadline.

    The store sets `updated`, and the deadline `lease` seconds from now, by its own clock. A change
    of status without a lease clears the deadline. Adding to something that is no number sets it.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    steps: Mapping[str, int] = field(default_factory=dict)
    lease: float | None = None


class Store(ABC):
    """A store of the tasks of many pools, shared by all workers that open its URL.

    Workers are processes, and threads of them share one store: methods are called concurrently.
    Each method is one atomic operation, and raises StoreUnavailable if a retry may succeed.

    Rows are dicts of id, status, origin (the status before the claim), priority, attempt,
    committed (the attempt that committed), errors, lost, preemptions, deadline, created, updated,
    claim (the id of the last claim), error, traceback, and as JSON text: worker, run, progress,
    res, definition. In a new row the numbers from priority to preemptions are 0, and everything
    that is not known yet is None. Times are seconds since 1970, by the store's clock. The store
    also keeps the pool, and the hash and the tokens of the definition, which queries refer to.

    Other programs may write into the store too. A row may therefore contain anything; one with an
    unknown status counts as failed, and a running one without a valid deadline as expired.
    """

    @abstractmethod
    def insert(self, pool: str, definitions: Sequence[Definition]) -> int:
        """Insert definitions that are new to the pool (by hash); return their number."""

    @abstractmethod
    def find_ids(self, pool: str, hashes: Sequence[str]) -> dict[str, str]:
        """Return `{hash: id}` of the hashes that the pool contains."""

    @abstractmethod
    def claim(self, pool: str, status: str, condition: Condition, change: Change) -> Row | None:
        """Change the first matching row of a status and return the changed row, or None.

        The highest priority comes first, then the oldest row.
        """

    @abstractmethod
    def find_claim(self, pool: str, claim: str) -> Row | None:
        """Return the running row with this claim id, or None."""

    @abstractmethod
    def find_expired_rows(self, pool: str) -> list[Row]:
        """Return the running rows whose deadline has passed, oldest first."""

    @abstractmethod
    def change(
        self, id: str, attempt: int, change: Change, *, only_if_expired: bool = False
    ) -> bool:
        """Change a running row of this attempt; return False if there is none any more.

        With `only_if_expired`, only if its deadline has passed.
        """

    @abstractmethod
    def change_all(self, pool: str, condition: Condition, change: Change) -> int:
        """Change all matching rows, also those that workers run; return their number."""

    @abstractmethod
    def redefine(self, id: str, definition: Definition, change: Change) -> bool:
        """Change a row and replace its definition; return False if there is no such row.

        Raises ValueError if another row of the pool has this definition.
        """

    @abstractmethod
    def find(self, pool: str, condition: Condition) -> list[Row]:
        """Return the matching rows, oldest first."""

    @abstractmethod
    def count(self, pool: str, condition: Condition) -> dict[str, int]:
        """Count the matching rows by status."""

    @abstractmethod
    def delete(self, pool: str, condition: Condition) -> int:
        """Delete the matching rows; return their number."""

    @abstractmethod
    def pools(self) -> list[str]:
        """Return the names of the pools that contain tasks."""

    @abstractmethod
    def close(self) -> None:
        """Close the connections."""


def open_store(url: str) -> Store:
    """Open the store of a URL (`URL_FORMS`)."""
    scheme, separator, _ = url.partition(":")
    scheme = scheme.partition("+")[0]
    if scheme not in STORES:
        # The message names the scheme only, because the rest may contain a password.
        reason = (
            unknown_name_message("scheme", scheme, STORES)
            if separator
            else f"{url!r} has no scheme."
        )
        raise TaskStoreError(
            f"the task URL names no store that qtorch supports: {reason} Use {URL_FORMS}."
        )
    store: Store = locate(STORES[scheme])(url)
    return store


def sum_counts(groups: Iterable[tuple[Any, int]]) -> dict[str, int]:
    """Return the numbers of rows by status; those with an unknown status count as failed."""
    counts: dict[str, int] = {}
    for status, number in groups:
        known_status = status if status in STATUSES else FAILED
        counts[known_status] = counts.get(known_status, 0) + number
    return counts


def other_statuses(statuses: Sequence[str]) -> list[str] | None:
    """Return all statuses but these if FAILED is one of them, which includes unknown statuses."""
    return [s for s in STATUSES if s not in statuses] if FAILED in statuses else None


def is_current_version(version: int | None, store_name: str) -> bool:
    """Whether a store's tables need no migration; `version` is None for a new store.

    Raises TaskStoreVersionError if a newer qtorch wrote them.
    """
    if version is not None and version > SCHEMA_VERSION:
        raise TaskStoreVersionError(
            f"the task store {store_name} has version {version} of the tables, but this qtorch "
            f"knows up to {SCHEMA_VERSION}. Update qtorch, or use another store."
        )
    return version == SCHEMA_VERSION


def retry_while_unavailable(call: Callable[[], T], *, patience: float, action: str) -> T:
    """Return the result of a call; retry for `patience` seconds while the store is unavailable.

    The pauses grow from 20 ms to 5 s, with random jitter. Raises StoreTimeout after `patience`.
    """
    begin = time.monotonic()
    pause, last_log = 0.02, 0.0
    while True:
        try:
            return call()
        except StoreUnavailable as error:
            elapsed_seconds = time.monotonic() - begin
            if elapsed_seconds >= patience:
                raise StoreTimeout(
                    f"{action}: the task store has not answered for {elapsed_seconds:.0f} s "
                    f"({error}). Start it or correct its URL; its tasks are not lost."
                ) from error
            if elapsed_seconds > 1.0 and elapsed_seconds - last_log > (
                LOG_SECONDS if last_log else 0.0
            ):
                last_log = elapsed_seconds
                log.warning(
                    "%s: the task store does not answer (%s); retrying for up to %.0f s",
                    action, error, patience - elapsed_seconds,
                )  # fmt: skip
        time.sleep(min(pause * random.uniform(0.5, 1.0), max(patience - elapsed_seconds, 0.01)))
        pause = min(pause * 1.6, MAX_PAUSE_SECONDS)


def parse_query(query: Mapping[str, Any] | None, status: str | None = None) -> Condition:
    """Parse a query; `status` overrides the query's own status.

    Raises ConfigError for an unsupported operator.
    """
    ids = statuses = hashes = None
    groups = []
    for key, value in (query or {}).items():
        values = _values(key, value)
        if key == "_id":
            ids = tuple(str(v) for v in values)
        elif key == "status":
            statuses = tuple(check_status(v) for v in values)
        elif key in WHOLE_DEFINITION:
            hashes = tuple(definition_hash(v) for v in values)
        else:
            path = next((key[len(p) :] for p in PREFIXES if key.startswith(p)), key)
            groups.append(tuple(query_token(path, v) for v in values))
    if status is not None:
        statuses = (check_status(status),)
    return Condition(ids, statuses, hashes, tuple(groups))


def check_status(status: Any) -> str:
    """Return a status; raise ConfigError, with the nearest name, if it does not exist."""
    if status not in STATUSES:
        raise ConfigError(unknown_name_message("task status", str(status), STATUSES))
    return str(status)


def _values(key: str, value: Any) -> list[Any]:
    if not isinstance(value, Mapping):
        return [value]
    operators = [k for k in value if str(k).startswith("$")]
    if not operators:
        return [value]
    if operators != ["$in"] or len(value) > 1:
        raise ConfigError(
            f"the query of {key!r} uses {', '.join(sorted(map(str, value)))}; pools support only "
            'equality and {"$in": [...]}.'
        )
    values = value["$in"]
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ConfigError(f"$in of {key!r} needs a list; got {values!r}.")
    return list(values)
