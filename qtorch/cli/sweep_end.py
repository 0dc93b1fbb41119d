"""Finish a sweep's command: print its table, close its run, return the exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from qtorch.cli.guard import INTERRUPTED
from qtorch.cli.submitted import is_submitit
from qtorch.cli.sweep import KILLED, RUNNING, SENT, JobResult
from qtorch.cli.sweep_start import SweepCommand, current_sweep
from qtorch.cli.sweep_table import print_sweep
from qtorch.core.errors import TrackingError
from qtorch.study.sweep import COMMAND_TAG, COUNT_TAG, SweepJob, adopt_run, end_sweep, sweep_jobs


def finish_sweep(results: Sequence[JobResult], interruption: BaseException | None) -> int:
    """Print the results, close the sweep's run and return the exit code.

    The code is 0 if all jobs finished, 1 if some failed, 130 if interrupted. `interruption` may
    also be an error of the launcher, which is raised again after the table.
    """
    sweep = current_sweep()
    if sweep is None or sweep.recorder is None:
        if interruption is not None:
            raise interruption
        return 1
    error = interruption if isinstance(interruption, Exception) else None
    is_interrupted = (interruption is not None and error is None) or sweep.is_stopped
    is_interrupted = is_interrupted or any(r.status == KILLED for r in results)
    jobs = list(results)
    try:
        for result in (r for r in results if r.sent and r.run_id):
            adopt_run(str(result.run_id), str(sweep.recorder.id), result.number, result.overrides)
        rows = _merge_results(results, sweep_jobs(str(sweep.recorder.id)))
        tags = sweep.recorder.list_tags()
        num_expected = int(tags[COUNT_TAG]) if COUNT_TAG in tags else None
        if rows or error is None:
            print_sweep(str(sweep.name), rows, num_expected, tags.get(COMMAND_TAG, ""))
        is_queued = any(r.status == SENT for r in results)
        if error is None or any(row.status == RUNNING for row in rows):
            end_sweep(sweep.recorder, is_interrupted=is_interrupted, is_queued=is_queued)
    except TrackingError as tracking_error:
        print(f"error: {tracking_error}", file=sys.stderr)
    for job in jobs:
        if job.error and job.status != KILLED:
            print(f"error: job {job.number}: {job.error}", file=sys.stderr)
    if error is not None:
        raise error
    if is_interrupted:
        _print_resume_hint(sweep)
        return INTERRUPTED
    return int(any(j.error for j in jobs))


def _merge_results(results: Sequence[JobResult], jobs: Sequence[SweepJob]) -> list[SweepJob]:
    """Merge the jobs in the tracking store with what only this process knows."""
    results_by_run = {r.run_id: r for r in results if r.run_id}
    rows = []
    for job in jobs:
        result = results_by_run.get(str(job.run_id))
        note = job.note if result is None else result.note
        rows.append(SweepJob(**{**vars(job), "note": note}))
    run_ids = {j.run_id for j in rows}
    rows += [
        _result_row(r)
        for r in results
        if r.run_id not in run_ids and (r.run_id or r.status != KILLED)
    ]
    return sorted(rows, key=lambda j: j.number)


def _result_row(result: JobResult) -> SweepJob:
    """Convert a result without a run in the sweep's store to a row of the table."""
    return SweepJob(
        number=result.number,
        overrides=result.overrides,
        status=result.status,
        run_id=result.run_id,
        metrics=result.metrics,
        seconds=result.seconds,
        setting=f"job {result.number}",
        error=result.error,
        note=f"task {result.sent['id']}" if result.sent else result.note,
    )


def _print_resume_hint(sweep: SweepCommand) -> None:
    if is_submitit(sweep.launcher):
        text = f"submitted jobs continue; follow them with qtorch sweep show {sweep.name}"
    else:
        text = "finished jobs are kept, started jobs resume from their checkpoints"
    print(
        f"interrupted: {text}. Resume with: qtorch sweep resume {sweep.name}",
        file=sys.stderr,
    )
