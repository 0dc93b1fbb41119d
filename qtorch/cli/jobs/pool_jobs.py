"""Jobs that run as tasks of a pool (`runner=rm`): submit them, wait for them, get their results."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from qtorch.cli.compose import job_task
from qtorch.cli.guard import error_line
from qtorch.cli.jobs.results import FAILED, FINISHED
from qtorch.cli.tables import tasks as task_tables
from qtorch.core.errors import ConfigError, QtorchError, format_count
from qtorch.core.secrets import redact_urls
from qtorch.study.sweep import JobResult
from qtorch.task.definition import Task
from qtorch.task.manager import TaskManager
from qtorch.task.pool import URL_VARIABLE
from qtorch.tracking.recorder import Recorder
from qtorch.trainer.pooled import pool_definition


def submit_to_pool(request: Mapping[str, Any]) -> dict[str, Any]:
    """Submit a job's task to a pool; return the task's ID and its pool (`JobResult.pool_task`)."""
    settings = request["settings"]
    if request["resume"] is not None:
        raise ConfigError("resume needs runner=local; a pool resumes its own tasks.")
    task, experiment = job_task(settings), settings["experiment_name"]
    pool = settings["pool"] or experiment
    manager = TaskManager(pool, settings["url"])
    (id,) = manager.create_task([pool_definition(task, experiment, request["run_name"])])
    return {"id": id, "pool": pool, "url": redact_urls(manager.url), "wait": bool(settings["wait"])}


def wait_for_pool_jobs(jobs: Sequence[JobResult]) -> None:
    """Wait for the tasks of the jobs and fill the jobs' results from their runs."""
    # Equal jobs share a task.
    pools: dict[tuple[str, str], dict[str, list[JobResult]]] = {}
    for job in jobs:
        if (task := job.pool_task) is not None:
            jobs_by_task = pools.setdefault((task["pool"], task["url"]), {})
            jobs_by_task.setdefault(task["id"], []).append(job)
    for (pool, url), jobs_by_task in pools.items():
        options = pool_options(pool, url)
        print(
            f"{format_count(len(jobs_by_task), 'task')} in pool {pool}; start a worker with: "
            f"qtorch worker {options}",
            file=sys.stderr,
        )
        wait_hint = f"wait for them with: qtorch tasks wait {options}"
        pool_tasks = (j.pool_task for same_jobs in jobs_by_task.values() for j in same_jobs)
        if not all(task and task["wait"] for task in pool_tasks):
            print(wait_hint, file=sys.stderr)
            continue
        manager, query = TaskManager(pool, url), {"_id": {"$in": list(jobs_by_task)}}
        try:
            with task_tables.show_progress(pool) as on_progress:
                manager.wait(query, on_progress=on_progress)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"The tasks stay in the pool; {wait_hint}") from None
        for task in manager.query(query):
            for job in jobs_by_task[task["_id"]]:
                _fill_result(job, task)


def pool_options(pool: str, url: str) -> str:
    """Format the options that select a pool, without passwords and without the default URL."""
    if redact_urls(url) == redact_urls(os.environ.get(URL_VARIABLE, "")):
        return f"pool={pool}"
    return f"pool={pool} url={redact_urls(url)}"


def _fill_result(job: JobResult, task: Task) -> None:
    job.run_id = task_tables.task_run_id(task) or None
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
