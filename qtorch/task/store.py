"""What a pool asks of its store, and how it outlives the store's absences."""

from __future__ import annotations

import logging
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from qtorch.core.errors import TaskStoreError
from qtorch.task.definition import Definition
from qtorch.task.query import Condition

log = logging.getLogger(__name__)

T = TypeVar("T")
Row = dict[str, Any]

SCHEMA_VERSION = 1
TASKS, SCHEMA = "qtorch_tasks", "qtorch_task_schema"
LONGEST_PAUSE = 5.0
REMIND_SECONDS = 30.0


class StoreAway(Exception):
    """One try failed because the store is locked or does not answer; the next may not."""


@dataclass(frozen=True)
class Change:
    """What an update does to a row: `values` set, `steps` added, `lease` seconds from now.

    The store sets `updated`, and the deadline where there is a lease, by its own clock; a change
    of status without a lease clears the deadline.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    steps: Mapping[str, int] = field(default_factory=dict)
    lease: float | None = None


class Store(ABC):
    """A place where the tasks of many pools lie. Each method is one atomic step.

    Rows are dicts of id, status, origin (the status before the claim), priority, attempt,
    committed (the attempt that committed), errors, lost, preemptions, deadline, created, updated,
    claim (the mark of the last claim), error, traceback, and as JSON text: worker, run, progress,
    res, definition. Every method raises StoreAway where trying again may help.
    """

    @abstractmethod
    def insert(self, pool: str, definitions: Sequence[Definition]) -> int:
        """Add what the pool does not hold yet (by hash); how many were new."""

    @abstractmethod
    def ids(self, pool: str, hashes: Sequence[str]) -> dict[str, str]:
        """`{hash: id}` of those that the pool holds."""

    @abstractmethod
    def claim(self, pool: str, status: str, condition: Condition, change: Change) -> Row | None:
        """Change the first row (by priority, then age) that matches; the row as it is then."""

    @abstractmethod
    def claimed(self, pool: str, claim: str) -> Row | None:
        """The running row that bears a claim's mark."""

    @abstractmethod
    def expired(self, pool: str) -> list[Row]:
        """Running rows whose deadline has passed."""

    @abstractmethod
    def change(self, id: str, attempt: int, change: Change, *, expired: bool = False) -> bool:
        """Change a running row of this attempt; False where it is no longer so.

        With `expired`, only if its deadline has passed.
        """

    @abstractmethod
    def change_all(self, pool: str, condition: Condition, change: Change) -> int:
        """Change every row that matches, whoever runs it; how many."""

    @abstractmethod
    def redefine(self, id: str, definition: Definition, change: Change) -> bool:
        """Another definition for a row; ValueError where the pool holds that one already."""

    @abstractmethod
    def find(self, pool: str, condition: Condition) -> list[Row]:
        """The rows that match, oldest first."""

    @abstractmethod
    def count(self, pool: str, condition: Condition) -> dict[str, int]:
        """How many rows match, by status."""

    @abstractmethod
    def delete(self, pool: str, condition: Condition) -> int:
        """Remove the rows that match; how many."""

    @abstractmethod
    def pools(self) -> list[str]:
        """The names of the pools that hold tasks."""

    @abstractmethod
    def close(self) -> None:
        """Give the connections back."""


def retrying(call: Callable[[], T], *, patience: float, what: str) -> T:
    """The call's result, tried again for `patience` seconds while the store is away.

    Pauses grow from 20 ms to 5 s, spread by chance. Raises TaskStoreError when time is up.
    """
    begin = time.monotonic()
    pause, said = 0.02, 0.0
    while True:
        try:
            return call()
        except StoreAway as error:
            waited = time.monotonic() - begin
            if waited >= patience:
                raise TaskStoreError(
                    f"{what}: the task store has not answered for {waited:.0f} s ({error}). Start "
                    "it, or correct the URL; nothing that it holds is lost."
                ) from error
            if waited > 1.0 and waited - said > (REMIND_SECONDS if said else 0.0):
                said = waited
                log.warning(
                    "%s: the task store does not answer (%s); trying again for up to %.0f s",
                    what, error, patience - waited,
                )  # fmt: skip
        time.sleep(min(pause * random.uniform(0.5, 1.0), max(patience - waited, 0.01)))
        pause = min(pause * 1.6, LONGEST_PAUSE)
