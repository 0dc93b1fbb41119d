"""Claims of runs: only one process at a time works on a run (see `qtorch.process.lease`)."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from qtorch.core.errors import FileLockError, RunHeldError
from qtorch.process.lease import (
    describe_holder,
    has_dead_holder,
    hold_claim,
    is_abandoned,
    is_held,
)
from qtorch.tracking.locations import claims_folder
from qtorch.tracking.recorder import Recorder
from qtorch.tracking.store_types import RunRow

log = logging.getLogger(__name__)

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


@contextmanager
def share_run(run_id: str, tracking_uri: str) -> Iterator[None]:
    """Show inside the block that this process works on a run, as others may at the same time.

    Such a run is that of a sweep, which several commands may work on, or one of `R.start`. Without
    a folder that can be written, nobody can tell whether the process is still there.
    """
    path = _claim_path(run_id, tracking_uri, uuid.uuid4().hex)
    with ExitStack() as claim:
        try:
            for other in _claim_paths(run_id, tracking_uri):
                if other.name != f"run-{run_id}.json" and has_dead_holder(other):
                    other.unlink(missing_ok=True)
            claim.enter_context(hold_claim(path))
        except (OSError, FileLockError) as error:
            log.debug("cannot claim run %s: %s", run_id, error)
        yield


def is_run_held(run_id: str, tracking_uri: str) -> bool:
    """Whether a live process works on a run."""
    return any(is_held(path) for path in _claim_paths(run_id, tracking_uri))


def has_lost_process(run: RunRow, tracking_uri: str) -> bool:
    """Whether a run is RUNNING in the store, but its processes are known to be gone.

    They were killed so hard that they could not end the run, or their machine died. Unknown for a
    run that nobody claimed, such as one of `R.start_exp` in a script: False.
    """
    if run.status != Recorder.STATUS_R:
        return False
    paths = _claim_paths(run.id, tracking_uri)
    return any(map(is_abandoned, paths)) and not any(map(is_held, paths))


def _claim_path(run_id: str, tracking_uri: str, holder: str = "") -> Path:
    name = f"run-{run_id}-{holder}.json" if holder else f"run-{run_id}.json"
    return claims_folder(tracking_uri) / name


def _claim_paths(run_id: str, tracking_uri: str) -> list[Path]:
    """Return the claims of a run: that of the process that holds it, and of those that share it."""
    path = _claim_path(run_id, tracking_uri)
    return [path, *path.parent.glob(f"run-{run_id}-*.json")]
