"""One job of `qtorch train`: from the composed configuration to a run and a result."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from qtorch.cli.compose import (
    LOCAL,
    check_added_keys,
    check_missing_values,
    check_values,
    discard_inherited_settings,
    task_definition,
    translate_hydra_errors,
    warn_of_unread_portfolio,
)
from qtorch.cli.guard import error_line
from qtorch.cli.jobs.finished_jobs import use_hydra_config
from qtorch.cli.jobs.gpus import job_gpu_environment
from qtorch.cli.jobs.results import FAILED, KILLED, RESULT_FILE, command_results
from qtorch.cli.jobs.sweep_command import current_sweep, task_overrides
from qtorch.cli.jobs.work import (
    execute_job,
    execute_job_in_child,
    fail_lost_run,
    failure_hint,
    is_isolated,
    print_failure,
    record_failure,
)
from qtorch.cli.launchers.kinds import DetachedLauncher, launcher_class
from qtorch.cli.launchers.slurm import run_submitit_job
from qtorch.core.errors import ConfigError, TrackingError
from qtorch.core.instantiate import resolve_config
from qtorch.core.runtime import change_environment
from qtorch.core.secrets import complete_tree
from qtorch.core.session import FOLDER_VARIABLE, SWEEP_VARIABLE
from qtorch.process.child import ExitStatus
from qtorch.study.sweep import JobResult, sweep_jobs

OWN_MODEL = "lightning"  # the choice of `model` for a network of a user's own
# Overrides that a resumed run allows: they say nothing about its task.
RESUME_PREFIXES = ("resume=", "run=", "tracking", "log_level=", "sweep.", "workflow.")


_collected_requests: ContextVar[list[dict[str, Any]] | None] = ContextVar(
    "qtorch_collected_requests", default=None
)


@contextmanager
def collect_requests() -> Iterator[list[dict[str, Any]]]:
    """Context manager in which `run_job` only collects what `execute_job` needs of each job."""
    requests: list[dict[str, Any]] = []
    token = _collected_requests.set(requests)
    try:
        yield requests
    finally:
        _collected_requests.reset(token)


def run_job(config: DictConfig) -> None:
    """Train what the configuration describes; raise nothing but an interruption.

    Hydra discards the return values of jobs and stops a sweep at the first exception. Therefore the
    result, even a failure, is stored in the job's folder, and the command prints it at its end. The
    launcher's process, in which this is called, may run several jobs: the work itself is done in a
    child process.
    """
    result = _create_result(config)
    folder = Path(HydraConfig.get().runtime.output_dir)
    changes = {FOLDER_VARIABLE: str(HydraConfig.get().runtime.cwd)}
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        changes |= job_gpu_environment(config, HydraConfig.get())
    with change_environment(changes):
        _run(config, result, folder)


def _run(config: DictConfig, result: JobResult, folder: Path) -> None:
    try:
        settings = _validate_settings(config)
        request = _build_request(config, settings, result, folder)
        launcher, sweep = str(HydraConfig.get().launcher._target_), request["sweep"] is not None
        use_child_process = settings["runner"] == LOCAL and is_isolated(
            settings["sweep"]["isolate"], launcher, sweep=sweep
        )
    except Exception as error:
        record_failure(result, error)
        command_results.store(result, folder)
        if HydraConfig.get().mode == RunMode.MULTIRUN:  # else the command ends with this error
            print_failure(result)
        return
    collected = _collected_requests.get()
    if collected is not None:
        collected.append(request)
    elif use_child_process:
        _run_job_in_child(request, result, folder)
    elif issubclass(launcher_class(launcher), DetachedLauncher):
        run_submitit_job(lambda: execute_job(request))
    else:
        execute_job(request)


def _run_job_in_child(request: dict[str, Any], result: JobResult, folder: Path) -> None:
    """Run the job in a child process, which stores its result unless it dies."""
    (folder / RESULT_FILE).unlink(missing_ok=True)  # of an earlier command with the same folder
    is_in_launcher = request["sweep"] is not None and current_sweep() is None
    exit_status, run = execute_job_in_child(request, in_launcher=is_in_launcher)
    stored_result = command_results.load(folder)
    if stored_result is not None:
        result = stored_result
        command_results.add(result)
    else:
        _record_lost_process(result, exit_status, run)
        command_results.store(result, folder)
        if result.status == FAILED:
            print_failure(result)
    if result.status == KILLED and (request["sweep"] is None or current_sweep() is not None):
        raise KeyboardInterrupt(result.error)


def _build_request(
    config: DictConfig, settings: dict[str, Any], result: JobResult, folder: Path
) -> dict[str, Any]:
    """Collect the input of `execute_job` as plain data, because another process may do the work."""
    hydra = HydraConfig.get()
    run_name = settings["run_name"] or hydra.runtime.choices.get("model")
    if run_name == OWN_MODEL:
        from qtorch.cli.tables.tasks import model_name  # imports what other jobs do not need

        run_name = model_name(task_definition(settings)) or run_name
    return {
        "settings": settings,
        "number": result.number,
        "overrides": result.overrides,
        "folder": str(folder.resolve()),
        "run_name": None if run_name is None else str(run_name),
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
    with translate_hydra_errors():
        config = copy.deepcopy(config)
        hydra_config = HydraConfig.get()
        overrides = list(hydra_config.overrides.task)
        discard_inherited_settings(config, overrides)
        check_added_keys(config, overrides, OmegaConf.to_container(hydra_config, resolve=False))
        check_missing_values(config)
        warn_of_unread_portfolio(config, overrides)
        settings: dict[str, Any] = complete_tree(resolve_config(config))
    check_values(settings)
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
        if not o.lstrip("+").startswith(
            ("resume=", "run=", "tracking", "log_level=", "sweep.", "workflow.")
        )
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
    return JobResult(number, task_overrides(hydra.overrides.task), FAILED)


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
    stored_result = command_results.load(folder)
    if stored_result is None or stored_result.status == KILLED:
        seconds = 0.0 if stored_result is None else stored_result.seconds
        result = JobResult(number, task_words, FAILED, seconds, error=reason)
        _attach_run(result, close_run)
        command_results.store(result, folder)
        print_failure(result)
    job_return = JobReturn(overrides=task_words, cfg=config, status=JobStatus.COMPLETED)
    job_return.return_value = None
    return job_return


def _attach_run(result: JobResult, close_run: bool) -> None:
    """Set the run that a lost job had started, and mark it as failed if `close_run`."""
    sweep = current_sweep()
    if sweep is None or sweep.recorder is None:
        return
    try:
        jobs = sweep_jobs(str(sweep.recorder.id))
    except TrackingError as error:
        print(f"job {result.number}: cannot find its run: {error_line(error)}", file=sys.stderr)
        return
    for job in jobs:
        if (job.number, job.overrides) == (result.number, result.overrides):
            result.run_id = job.run_id
            if close_run:
                lost_run = {"tracking_uri": sweep.recorder.uri, "recorder_id": job.run_id}
                fail_lost_run(lost_run, str(result.error))
            return
