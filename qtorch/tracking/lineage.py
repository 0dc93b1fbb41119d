"""Where a run belongs: which run's model it went on from, what it is a part of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from qtorch.tracking.recorder import Recorder

FROM_TAG = "warm_start.from"
DEPTH_TAG = "warm_start.depth"  # how many trainings lie behind the weights
PARENT_TAG = "mlflow.parentRunId"  # nests a run under another on MLflow's page

_birth: ContextVar[dict[str, str] | None] = ContextVar("qtorch_birth_tags", default=None)


@contextmanager
def born_with(tags: dict[str, str]) -> Iterator[None]:
    """Runs that begin inside the block have these tags from the first moment.

    A process that is killed at any point leaves no run that cannot be told.
    """
    token = _birth.set({**birth_tags(), **tags})
    try:
        yield
    finally:
        _birth.reset(token)


def birth_tags() -> dict[str, str]:
    """The tags that a new run of this context is made with."""
    return dict(_birth.get() or {})


def tag_lineage(run: Recorder, earlier: Recorder) -> None:
    """Name the earlier run in the tags of `run`, and nest it there unless it belongs elsewhere.

    The earlier run is only read.
    """
    depth = int(earlier.list_tags().get(DEPTH_TAG, "0")) + 1
    tags = {FROM_TAG: earlier.id, DEPTH_TAG: str(depth)}
    if PARENT_TAG not in run.list_tags() and earlier.id != run.id:
        tags[PARENT_TAG] = earlier.id
    run.set_tags(**tags)


def told_of(recorder: Recorder, loaded: Any) -> Any:
    """A loaded object, told which run it comes from where it wants to know (`loaded_from`)."""
    tell = getattr(loaded, "loaded_from", None)
    if callable(tell):
        tell(recorder)
    return loaded
