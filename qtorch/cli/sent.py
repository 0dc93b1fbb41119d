"""Wait for jobs of `qtorch train runner=rm` and turn their tasks into results."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from qtorch.cli import task_table
from qtorch.cli.guard import error_line
from qtorch.cli.sweep import FAILED, FINISHED, JobResult
from qtorch.core.errors import QtorchError
from qtorch.task.definition import Task
from qtorch.task.manager import TaskManager
from qtorch.task.pool import URL_VARIABLE
from qtorch.tracking.locations import redact_password
from qtorch.tracking.recorder import Recorder


def wait_for_pool_jobs(jobs: Sequence[JobResult]) -> None:
    """Wait for the tasks of the jobs and fill the jobs' results from their runs."""
    pools: dict[tuple[str, str], list[JobResult]] = {}
    for job in jobs:
        if job.sent:
            pools.setdefault((job.sent["pool"], job.sent["url"]), []).append(job)
    for (pool, url), pool_jobs in pools.items():
        manager = TaskManager(pool, url)
        ids = [j.sent["id"] for j in pool_jobs if j.sent]
        query = {"_id": {"$in": ids}}
        print(
            f"{len(set(ids))} tasks in pool {pool}; start a worker with: "
            f"qtorch worker {_pool_options(pool, url)}",
            file=sys.stderr,
        )
        if not all(j.sent and j.sent["wait"] for j in pool_jobs):
            print(
                f"wait for them with: qtorch tasks wait {_pool_options(pool, url)}", file=sys.stderr
            )
            continue
        try:
            with task_table.show_progress(pool) as on_progress:
                manager.wait(query, on_progress=on_progress)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"The tasks stay in the pool; wait for them with: "
                f"qtorch tasks wait {_pool_options(pool, url)}"
            ) from None
        tasks = {t["_id"]: t for t in manager.query(query)}
        for job in pool_jobs:
            _fill_result(job, tasks[job.sent["id"]] if job.sent else None)


def _pool_options(pool: str, url: str) -> str:
    """Format the options that select a pool, without passwords and without the default URL."""
    if url == os.environ.get(URL_VARIABLE):
        return f"pool={pool}"
    return f"pool={pool} url={redact_password(url)}"


def _fill_result(job: JobResult, task: Task | None) -> None:
    if task is None:
        return
    job.run_id = task_table.task_run_id(task) or None
    if task["status"] != TaskManager.STATUS_DONE:
        job.status, job.error = FAILED, str(task["error"])
        return
    job.status, job.error = FINISHED, None
    recorder = task["res"]
    if isinstance(recorder, Recorder):
        job.run_id = recorder.id
        job.experiment = getattr(recorder, "experiment_name", None)
        try:
            job.metrics = recorder.list_metrics()
            job.seconds = float(recorder.load_object("fit_report")["seconds"])
        except QtorchError as error:
            print(f"run {recorder.id}: {error_line(error)}", file=sys.stderr)
