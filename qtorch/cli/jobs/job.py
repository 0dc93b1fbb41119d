"""Run one job of `qtorch train`: from the composed configuration to a run and a result."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qtorch.cli import task_tables as task_table
from qtorch.cli.compose import check_missing_values, explain_error
from qtorch.cli.guard import error_line
from qtorch.cli.jobs.finished_jobs import use_hydra_config
from qtorch.cli.jobs.results import (
    FAILED,
    FINISHED,
    KILLED,
    RESULT_FILE,
    JobResult,
    add_result,
    load_result,
)
from qtorch.cli.jobs.sweep_command import SWEEP_VARIABLE, current_sweep, task_overrides
from qtorch.cli.jobs.work import (
    LOCAL,
    POOL,
    execute_job,
    fail_lost_run,
    failure_hint,
    is_isolated,
    print_failure,
    record_failure,
    run_in_child_process,
    store_result,
)
from qtorch.cli.launchers.slurm import is_submitit, run_submitit_job
from qtorch.core.errors import ConfigError, QtorchError, TrackingError, unknown_name_message
from qtorch.core.instantiate import resolve_config
from qtorch.process.fork_server import ExitStatus
from qtorch.study.sweep import SweepJob, sweep_jobs
from qtorch.task.definition import Task
from qtorch.task.manager import TaskManager
from qtorch.task.pool import URL_VARIABLE
from qtorch.tracking.locations import redact_password
from qtorch.tracking.recorder import Recorder

RUNNERS = (LOCAL, POOL)


def run_job(config: DictConfig) -> None:
    """Train what the configuration describes; raise nothing but an interruption.

    Hydra discards the return values of jobs and stops a sweep at the first exception. Therefore the
    result, even a failure, is stored in the job's folder, and the command prints it at its end. The
    launcher's process, in which this is called, may run several jobs: the work itself is done in a
    child process.
    """
    result = _create_result(config)
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        settings = _validate_settings(config)
        request = _build_request(config, settings, result, folder)
        launcher, sweep = str(HydraConfig.get().launcher._target_), request["sweep"] is not None
        use_child_process = settings["runner"] == LOCAL and is_isolated(
            settings["sweep"]["isolate"], launcher, sweep=sweep
        )
    except Exception as error:
        record_failure(result, error)
        store_result(result, folder)
        print_failure(result)
        return
    if not use_child_process:
        if is_submitit(launcher):
            run_submitit_job(lambda: execute_job(request))
        else:
            execute_job(request)
        return
    exit_status, run = run_in_child_process(
        request, Path(str(HydraConfig.get().sweep.dir)).resolve()
    )
    stored_result = load_result(folder / RESULT_FILE)
    if stored_result is None:
        _record_lost_process(result, exit_status, run)
        store_result(result, folder)
        if result.status == FAILED:
            print_failure(result)
    else:
        add_result(stored_result)
    if (stored_result or result).status == KILLED and (not sweep or current_sweep() is not None):
        raise KeyboardInterrupt((stored_result or result).error)


def _build_request(
    config: DictConfig, settings: dict[str, Any], result: JobResult, folder: Path
) -> dict[str, Any]:
    """Collect the input of `execute_job` as plain data, because another process may do the work."""
    hydra = HydraConfig.get()
    return {
        "settings": settings,
        "number": result.number,
        "overrides": result.overrides,
        "folder": str(folder.resolve()),
        "model": hydra.runtime.choices.get("model"),
        "resume": _resume_run_id(settings, list(hydra.overrides.task)),
        "sweep": os.environ.get(SWEEP_VARIABLE) if hydra.mode == RunMode.MULTIRUN else None,
    }


def _record_lost_process(
    result: JobResult, exit_status: ExitStatus, run: Mapping[str, Any] | None
) -> None:
    """Set the result of a job whose process left none."""
    if exit_status.is_refused:
        result.status, result.error = KILLED, "Nothing was started."
        return
    result.status = FAILED
    result.error = f"the job's process {exit_status.description}{failure_hint(exit_status)}."
    if run is not None:
        result.run_id = run["recorder_id"]
        fail_lost_run(run, result.error)


def _validate_settings(config: DictConfig) -> dict[str, Any]:
    """Return the settings as plain data after checking that they are complete."""
    try:
        check_missing_values(config)
        settings: dict[str, Any] = resolve_config(config)
    except OmegaConfBaseException as error:
        raise ConfigError(explain_error(error)) from error
    if settings["runner"] not in RUNNERS:
        raise ConfigError(unknown_name_message("runner", str(settings["runner"]), RUNNERS))
    return settings


def _resume_run_id(settings: Mapping[str, Any], overrides: Sequence[str]) -> str | None:
    """Return the ID of the run to resume: `resume=ID` or `run=ID resume=true`."""
    resume, run = settings.get("resume"), settings.get("run")
    if resume is None or resume is False:
        if run is not None:
            raise ConfigError(f"run={run} needs resume=true; use resume={run} to resume the run.")
        return None
    run_id = run if resume is True else resume
    if run_id is None:
        raise ConfigError("resume=true needs a run ID: resume=RUN_ID, or run=RUN_ID resume=true.")
    ignored_overrides = [
        o
        for o in overrides
        if not o.lstrip("+").startswith(("resume=", "run=", "tracking", "log_level=", "sweep."))
    ]
    if ignored_overrides:
        raise ConfigError(
            f"a resumed run uses its own task, so {', '.join(ignored_overrides)} would be ignored; "
            "remove it, or start a new run."
        )
    return str(run_id)


def _create_result(config: DictConfig) -> JobResult:
    hydra = HydraConfig.get()
    number = int(hydra.job.num) if not OmegaConf.is_missing(hydra.job, "num") else 0
    return JobResult(number, task_overrides(hydra.overrides.task), FAILED, 0.0)


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


def wait_for_pool_jobs(jobs: Sequence[JobResult]) -> None:
    """Wait for the tasks of the jobs and fill the jobs' results from their runs."""
    pools: dict[tuple[str, str], list[JobResult]] = {}
    for job in jobs:
        if job.pool_task:
            pools.setdefault((job.pool_task["pool"], job.pool_task["url"]), []).append(job)
    for (pool, url), pool_jobs in pools.items():
        manager = TaskManager(pool, url)
        ids = [j.pool_task["id"] for j in pool_jobs if j.pool_task]
        query = {"_id": {"$in": ids}}
        print(
            f"{len(set(ids))} tasks in pool {pool}; start a worker with: "
            f"qtorch worker {_pool_options(pool, url)}",
            file=sys.stderr,
        )
        if not all(j.pool_task and j.pool_task["wait"] for j in pool_jobs):
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
            _fill_result(job, tasks[job.pool_task["id"]] if job.pool_task else None)


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
