"""Which run's model a run went on from."""

from __future__ import annotations

from typing import Any

from qtorch.tracking.recorder import Recorder

FROM_TAG = "warm_start.from"
DEPTH_TAG = "warm_start.depth"  # how many trainings lie behind the weights
PARENT_TAG = "mlflow.parentRunId"  # nests a run under another on MLflow's page


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
