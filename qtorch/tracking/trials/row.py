"""A trial, as those see it who run one or look at all."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Asked:
    """A trial that this process is to run."""

    number: int
    id: int
    params: dict[str, Any]
    retry: bool = False  # it had failed: its job is tried again


@dataclass(frozen=True)
class TrialRow:
    """How a trial stands."""

    number: int
    state: str
    value: float | None
    params: dict[str, Any] = field(default_factory=dict)
    run_id: str | None = None
    error: str | None = None
    steps: int = 0
    retry_of: int | None = None
    replaced: bool = False  # by a trial that was run in its stead
