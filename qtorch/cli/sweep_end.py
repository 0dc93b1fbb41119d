"""The end of a sweep's command: its table, its run's status, its exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from qtorch.cli.guard import INTERRUPTED
from qtorch.cli.submitted import submitted
from qtorch.cli.sweep import KILLED, RUNNING, SENT, JobResult
from qtorch.cli.sweep_start import SweepCommand, the_sweep
from qtorch.cli.sweep_table import print_sweep
from qtorch.core.errors import TrackingError
from qtorch.study.sweep import COMMAND_TAG, COUNT_TAG, SweepJob, adopt, end_sweep, sweep_jobs


def end(results: Sequence[JobResult], interrupted: BaseException | None) -> int:
    """Print what there is, close the sweep's run; 0 finished, 1 some failed, 130 interrupted.

    `interrupted` may be an error of the launcher's too, which is raised again after the table.
    """
    sweep = the_sweep()
    if sweep is None or sweep.recorder is None:
        if interrupted is not None:
            raise interrupted
        return 1
    error = interrupted if isinstance(interrupted, Exception) else None
    stopped = (interrupted is not None and error is None) or sweep.stopped
    stopped = stopped or any(r.status == KILLED for r in results)
    jobs = list(results)
    try:
        for result in (r for r in results if r.sent and r.run_id):
            adopt(str(result.run_id), str(sweep.recorder.id), result.number, result.overrides)
        rows = _merged(results, sweep_jobs(str(sweep.recorder.id)))
        tags = sweep.recorder.list_tags()
        expected = int(tags[COUNT_TAG]) if COUNT_TAG in tags else None
        if rows or error is None:
            print_sweep(str(sweep.name), rows, expected, tags.get(COMMAND_TAG, ""))
        sent = any(r.status == SENT for r in results)
        if error is None or any(row.status == RUNNING for row in rows):
            end_sweep(sweep.recorder, interrupted=stopped, sent=sent)
    except TrackingError as unread:
        print(f"error: {unread}", file=sys.stderr)
    for job in jobs:
        if job.error and job.status != KILLED:
            print(f"error: job {job.number}: {job.error}", file=sys.stderr)
    if error is not None:
        raise error
    if stopped:
        _say_how_to_go_on(sweep)
        return INTERRUPTED
    return int(any(j.error for j in jobs))


def _merged(results: Sequence[JobResult], stored: Sequence[SweepJob]) -> list[SweepJob]:
    """The jobs as the store has them, with what only this process knows."""
    own = {r.run_id: r for r in results if r.run_id}
    rows = []
    for job in stored:
        mine = own.get(str(job.run_id))
        note = job.note if mine is None else mine.note
        rows.append(SweepJob(**{**vars(job), "note": note}))
    known = {j.run_id for j in rows}
    rows += [
        _as_row(r) for r in results if r.run_id not in known and (r.run_id or r.status != KILLED)
    ]
    return sorted(rows, key=lambda j: j.number)


def _as_row(result: JobResult) -> SweepJob:
    """A job that has no run, or one in a store that this sweep is not in."""
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


def _say_how_to_go_on(sweep: SweepCommand) -> None:
    if submitted(sweep.launcher):
        told = f"what the scheduler has goes on; qtorch sweep show {sweep.name} tells how"
    else:
        told = "finished jobs stay, begun ones keep their checkpoint"
    print(
        f"interrupted: {told}. Go on with: qtorch sweep resume {sweep.name}",
        file=sys.stderr,
    )
