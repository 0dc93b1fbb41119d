"""A trial as plain values: one that a process is to run, and one row of a study."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


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
