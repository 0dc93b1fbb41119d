"""Claims of runs: only one process at a time works on a run (see `qtorch.process.lease`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qtorch.core.errors import RunHeldError
from qtorch.process.lease import describe_holder, hold_claim, is_abandoned, is_held
from qtorch.tracking.locations import claims_folder
from qtorch.tracking.recorder import Recorder
from qtorch.tracking.store_types import RunRow

PROCESS_GONE = "its process is gone"  # the note of a run that is RUNNING in the store only


@contextmanager
def hold_run(run_id: str, tracking_uri: str) -> Iterator[None]:
    """Hold a run inside the block; RunHeldError if another live process holds it."""
    path = _claim_path(run_id, tracking_uri)
    with hold_claim(path) as has_claim:
        if not has_claim:
            raise RunHeldError(
                f"run {run_id} is in use: {describe_holder(path)} works on it, and two processes "
                "must not write into one run. Wait until that process ends, or stop it; then "
                "resume the run."
            )
        yield


def is_run_held(run_id: str, tracking_uri: str) -> bool:
    """Whether a live process works on a run."""
    return is_held(_claim_path(run_id, tracking_uri))


def has_lost_process(run: RunRow, tracking_uri: str) -> bool:
    """Whether a run is RUNNING in the store, but its process is known to be gone.

    It was killed so hard that it could not end the run, or its machine died. Unknown for a run
    that nobody claimed, such as one of `R.start` in a script: False.
    """
    return run.status == Recorder.STATUS_R and is_abandoned(_claim_path(run.id, tracking_uri))


def _claim_path(run_id: str, tracking_uri: str) -> Path:
    return claims_folder(tracking_uri) / f"run-{run_id}.json"
