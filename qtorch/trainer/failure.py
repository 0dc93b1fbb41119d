"""What stays of a task that failed: its error in the run, its run in the list of recorders."""

from __future__ import annotations

import logging
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from qtorch.core.heartbeat import RUN, beat
from qtorch.tracking.recorder import Recorder

log = logging.getLogger(__name__)

ERROR_TAG = "error"
ERROR_FILE = "error.txt"
TAG_LIMIT = 2000

_started: ContextVar[list[Recorder] | None] = ContextVar("qtorch_started_runs", default=None)


@contextmanager
def started_runs(runs: list[Recorder] | None = None) -> Iterator[list[Recorder]]:
    """Collects the runs that tasks start inside the block, so that a failed one is not lost."""
    runs = [] if runs is None else runs
    token = _started.set(runs)
    try:
        yield runs
    finally:
        _started.reset(token)


def note_started(recorder: Recorder) -> None:
    """Tell the enclosing `started_runs` of a run, and whoever keeps the task's lease."""
    beat(
        RUN,
        experiment_id=recorder.experiment_id,
        recorder_id=recorder.id,
        tracking_uri=getattr(recorder, "uri", None),
    )
    runs = _started.get()
    if runs is not None:
        runs.append(recorder)


def one_line(error: BaseException) -> str:
    """`Type: message` without line breaks, short enough for a tag."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:TAG_LIMIT]


def record_failure(recorder: Recorder, error: BaseException) -> None:
    """The error as the run's tag and its traceback as an artifact.

    A store that refuses these too is reported in the log: the first error is the one to raise.
    """
    try:
        recorder.set_tags(**{ERROR_TAG: one_line(error)})
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, ERROR_FILE)
            path.write_text("".join(traceback.format_exception(error)))
            recorder.log_artifact(str(path))
    except Exception as second:
        log.warning("the failure could not be stored in run %s: %s", recorder.id, one_line(second))


def error_of(recorder: Recorder) -> str | None:
    """The error of a failed run, one line; None where it has none."""
    tag = recorder.list_tags().get(ERROR_TAG)
    return None if tag is None else str(tag)
