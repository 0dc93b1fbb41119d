"""Record a job that its launcher has lost for good as a failed job of the sweep."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig

from qtorch.cli.isolation import fail_lost_run
from qtorch.cli.settled_jobs import use_hydra_config
from qtorch.cli.sweep import FAILED, KILLED, RESULT_FILE, JobResult, load_result
from qtorch.cli.sweep_start import current_sweep, task_overrides
from qtorch.cli.work import print_failure, store_result
from qtorch.core.errors import TrackingError
from qtorch.study.sweep import SweepJob, sweep_jobs


def record_lost_job(
    config: DictConfig,
    number: int,
    overrides: Sequence[str],
    reason: str,
    *,
    close_run: bool = True,
) -> JobReturn:
    """Store the result of a job whose process died, and return a JobReturn without an error.

    An error would make Hydra skip the sweep's other jobs and its table. `config` is the job's
    configuration as composed by Hydra. A run that the job has started is marked as failed; with
    `close_run=False` it stays interrupted, and the sweep resumes it without `retry`. A result that
    the process has written is kept, unless it says that the process was interrupted.
    """
    task_words = task_overrides(overrides)
    with use_hydra_config(config):
        folder = Path(str(config.hydra.sweep.dir), str(config.hydra.sweep.subdir))
    stored_result = load_result(folder / RESULT_FILE)
    if stored_result is None or stored_result.status == KILLED:
        result = JobResult(
            number,
            task_words,
            FAILED,
            0.0 if stored_result is None else stored_result.seconds,
            error=reason,
        )
        _attach_run(result, close_run)
        folder.mkdir(parents=True, exist_ok=True)
        store_result(result, folder)
        print_failure(result)
    job_return = JobReturn(overrides=task_words, cfg=config, status=JobStatus.COMPLETED)
    job_return.return_value = None
    return job_return


def _attach_run(result: JobResult, close_run: bool) -> None:
    sweep = current_sweep()
    if sweep is None or sweep.recorder is None:
        return
    try:
        run = _find_run(result, str(sweep.recorder.id))
    except TrackingError as error:
        print(f"job {result.number}: cannot find its run: {error}", file=sys.stderr)
        return
    if run is not None:
        result.run_id = run.run_id
    if run is not None and close_run:
        lost_run = {"tracking_uri": sweep.recorder.uri, "recorder_id": run.run_id}
        fail_lost_run(lost_run, str(result.error))


def _find_run(result: JobResult, sweep_id: str) -> SweepJob | None:
    """Find the run that the job has started."""
    for job in sweep_jobs(sweep_id):
        if (job.number, job.overrides) == (result.number, result.overrides):
            return job
    return None
