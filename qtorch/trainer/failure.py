"""Failed tasks: store the error in the run, and keep track of the runs that tasks started."""

from __future__ import annotations

import logging
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from qtorch.core.secrets import redact_urls
from qtorch.process.heartbeat import RUN, beat
from qtorch.tracking.recorder import Recorder

log = logging.getLogger(__name__)

ERROR_TAG = "error"
ERROR_FILE = "error.txt"
TAG_LIMIT = 2000

_started_runs: ContextVar[list[Recorder] | None] = ContextVar("qtorch_started_runs", default=None)


@contextmanager
def collect_started_runs(runs: list[Recorder] | None = None) -> Iterator[list[Recorder]]:
    """Collect the runs that tasks start inside the block, so that failed ones are known too."""
    runs = [] if runs is None else runs
    token = _started_runs.set(runs)
    try:
        yield runs
    finally:
        _started_runs.reset(token)


def announce_run(recorder: Recorder) -> None:
    """Report a started run to the enclosing `collect_started_runs` and to the holder of the lease.

    The lease holder learns of it through a heartbeat with the run's ID.
    """
    beat(
        RUN,
        experiment_id=recorder.experiment_id,
        recorder_id=recorder.id,
        tracking_uri=redact_urls(recorder.uri),
    )
    runs = _started_runs.get()
    if runs is not None:
        runs.append(recorder)


def error_summary(error: BaseException) -> str:
    """`Type: message` on one line, short enough for a tag, without the secrets in URLs."""
    return redact_urls(" ".join(f"{type(error).__name__}: {error}".split()))[:TAG_LIMIT]


def record_failure(recorder: Recorder, error: BaseException) -> None:
    """Store the error as the run's tag `error` and its traceback as the artifact `error.txt`.

    Each is stored even if the other cannot be. A failing store is only logged, so that the
    original error is the one raised. The run's log ends with it, too.
    """
    log.error("run %s failed: %s", recorder.id, error_summary(error), extra={"file_only": True})
    for store in (_tag_error, _save_traceback):
        try:
            store(recorder, error)
        except Exception as store_error:
            log.warning(
                "could not store the error in run %s: %s", recorder.id, error_summary(store_error)
            )


def _tag_error(recorder: Recorder, error: BaseException) -> None:
    recorder.set_tags(**{ERROR_TAG: error_summary(error)})


def _save_traceback(recorder: Recorder, error: BaseException) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, ERROR_FILE)
        text = redact_urls("".join(traceback.format_exception(error)))
        path.write_text(text, encoding="utf-8")
        recorder.log_artifact(path)


def get_error(recorder: Recorder) -> str | None:
    """The error of a failed run on one line, or None."""
    tag = recorder.list_tags().get(ERROR_TAG)
    return None if tag is None else str(tag)
