"""Lineage of runs: the run whose model a run starts from, and the parent run on MLflow's page."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from qtorch.tracking.recorder import Recorder

FROM_TAG = "warm_start.from"
DEPTH_TAG = "warm_start.depth"  # number of earlier trainings that the weights went through
PARENT_TAG = "mlflow.parentRunId"  # nests a run under another on MLflow's page

_initial_tags: ContextVar[dict[str, str] | None] = ContextVar("qtorch_birth_tags", default=None)


@contextmanager
def with_run_tags(tags: dict[str, str]) -> Iterator[None]:
    """Give every run that is created inside the block these tags from the start.

    The tags are part of the request that creates the run, so that even a process that is killed
    right afterwards leaves a run that can be identified.
    """
    token = _initial_tags.set({**initial_run_tags(), **tags})
    try:
        yield
    finally:
        _initial_tags.reset(token)


def initial_run_tags() -> dict[str, str]:
    """Return the tags that a new run of this context is created with."""
    return dict(_initial_tags.get() or {})


def tag_lineage(run: Recorder, earlier: Recorder) -> None:
    """Tag `run` with the earlier run whose weights it starts from, and nest it under that run.

    A run that already has a parent keeps it. The earlier run is only read.
    """
    depth = int(earlier.list_tags().get(DEPTH_TAG, "0")) + 1
    tags = {FROM_TAG: earlier.id, DEPTH_TAG: str(depth)}
    if PARENT_TAG not in run.list_tags() and earlier.id != run.id:
        tags[PARENT_TAG] = earlier.id
    run.set_tags(**tags)


def call_load_hook(recorder: Recorder, value: Any) -> Any:
    """Tell a loaded object which run it comes from if it has an `on_load` hook, and return it."""
    hook = getattr(value, "on_load", None)
    if callable(hook):
        hook(recorder)
    return value
