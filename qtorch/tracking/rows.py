"""Experiments, runs and metric points of the store as plain values."""

from __future__ import annotations

from dataclasses import dataclass, field


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
