"""Run one job of `qtorch train`: from the composed configuration to a run and a result."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qtorch.cli.hydra_errors import check_missing_values, explain_error
from qtorch.cli.isolation import fail_lost_run, failure_hint, is_isolated, run_in_child_process
from qtorch.cli.submitted import is_submitit, run_submitit_job
from qtorch.cli.sweep import (
    FAILED,
    KILLED,
    RESULT_FILE,
    JobResult,
    add_result,
    load_result,
)
from qtorch.cli.sweep_start import SWEEP_VARIABLE, current_sweep, task_overrides
from qtorch.cli.work import LOCAL, POOL, execute_job, print_failure, record_failure, store_result
from qtorch.core.errors import ConfigError, unknown_name
from qtorch.core.instantiate import plain
from qtorch.task.forked import ExitStatus

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
        settings: dict[str, Any] = plain(config)
    except OmegaConfBaseException as error:
        raise ConfigError(explain_error(error)) from error
    if settings["runner"] not in RUNNERS:
        raise ConfigError(unknown_name("runner", str(settings["runner"]), RUNNERS))
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
