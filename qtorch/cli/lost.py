"""A job that a launcher has lost for good: a failed job of its sweep, as any other."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig

from qtorch.cli.isolation import close_lost
from qtorch.cli.settled_jobs import as_hydras
from qtorch.cli.sweep import FAILED, KILLED, RESULT_FILE, JobResult, stored_result
from qtorch.cli.sweep_start import plain_words, the_sweep
from qtorch.cli.work import print_failure, store
from qtorch.core.errors import TrackingError
from qtorch.study.sweep import SweepJob, sweep_jobs


def note_lost_job(
    config: DictConfig, number: int, overrides: Sequence[str], why: str, *, closed: bool = True
) -> JobReturn:
    """Store the result of a job whose process is gone; what Hydra is told of it is no error.

    An error would keep the sweep from its other jobs and from its table. `config` is the job's, as
    Hydra composed it. A run that the job has begun is closed as failed; not `closed`, it stays
    interrupted, and the sweep takes it up again without being asked to retry. A result that the
    process has left stands, unless it was asked to stop.
    """
    words = plain_words(overrides)
    with as_hydras(config):
        folder = Path(str(config.hydra.sweep.dir), str(config.hydra.sweep.subdir))
    told = stored_result(folder / RESULT_FILE)
    if told is None or told.status == KILLED:
        result = JobResult(number, words, FAILED, 0.0 if told is None else told.seconds, error=why)
        _find_run(result, closed)
        folder.mkdir(parents=True, exist_ok=True)
        store(result, folder)
        print_failure(result)
    returned = JobReturn(overrides=words, cfg=config, status=JobStatus.COMPLETED)
    returned.return_value = None
    return returned


def _find_run(result: JobResult, closed: bool) -> None:
    sweep = the_sweep()
    if sweep is None or sweep.recorder is None:
        return
    try:
        run = _run_of(result, str(sweep.recorder.id))
    except TrackingError as error:
        print(f"job {result.number}: its run cannot be found: {error}", file=sys.stderr)
        return
    if run is not None:
        result.run_id = run.run_id
    if run is not None and closed:
        lost = {"tracking_uri": sweep.recorder.uri, "recorder_id": run.run_id}
        close_lost(lost, str(result.error))


def _run_of(result: JobResult, sweep_id: str) -> SweepJob | None:
    """The run that the job has begun."""
    for job in sweep_jobs(sweep_id):
        if (job.number, job.overrides) == (result.number, result.overrides):
            return job
    return None
