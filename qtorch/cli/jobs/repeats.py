"""Jobs of one command that are the same task, e.g. because an override changes nothing.

They share a run, which can only have the number of one of them; the others are its repeats.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from qtorch.cli.jobs.results import KILLED
from qtorch.study.sweep import JOB_TAG, JobResult
from qtorch.study.sweep_job import ELSEWHERE, FAILED_BEFORE, SKIPPED
from qtorch.tracking.manager import R


def connect_repeats(results: Sequence[JobResult]) -> None:
    """Set `repeats` and `same_as` of the jobs that share a run.

    The run belongs to the job that worked on it, else to the first one. A job that left the work to
    it has no error: the run has the result of both.
    """
    jobs_by_run: dict[str, list[JobResult]] = {}
    for result in results:
        if result.run_id is not None:
            jobs_by_run.setdefault(str(result.run_id), []).append(result)
    for jobs in (jobs for jobs in jobs_by_run.values() if len(jobs) > 1):
        workers = [job for job in jobs if job.note not in (SKIPPED, ELSEWHERE, FAILED_BEFORE)]
        owner = (workers or jobs)[0]
        repeats = [job for job in jobs if job is not owner]
        owner.repeats = [{"number": j.number, "overrides": j.overrides} for j in repeats]
        for job in repeats:
            job.same_as = owner.number
            if job.note == ELSEWHERE and workers:
                job.error = None


def store_repeats(sweep_id: str, results: Sequence[JobResult]) -> None:
    """Write the repeats of the jobs into the tags of their runs, for `sweep_jobs`."""
    for job in (job for job in results if job.repeats):
        details = {"number": job.number, "overrides": job.overrides, "repeats": job.repeats}
        recorder = R.get_recorder(recorder_id=job.run_id)
        recorder.set_tags(**{JOB_TAG + sweep_id: json.dumps(details)})


def failure_texts(results: Sequence[JobResult]) -> list[str]:
    """Return the errors of the failed jobs, one text for all jobs that are the same task."""
    failures = [job for job in results if job.error and job.status != KILLED]
    numbers = {job.number for job in failures}
    texts = []
    for job in failures:
        if job.same_as in numbers:
            continue  # the text of that job names this one
        equal = [str(other.number) for other in failures if other.same_as == job.number]
        name = f"job {job.number}"
        if equal:
            name = f"jobs {', '.join([str(job.number), *equal])} (the same task)"
        texts.append(f"{name}: {job.error}")
    return texts
