"""A run of before by its id, for what goes on from it and is given none but its own recorder."""

from __future__ import annotations

from qtorch.tracking.r import R
from qtorch.tracking.recorder import Recorder


def earlier_run(recorder_id: str) -> Recorder:
    """The run of that id in the tracking store in force, to be read. NotInStoreError without it."""
    found: Recorder = R.get_recorder(recorder_id=recorder_id)
    return found
