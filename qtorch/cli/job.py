"""One job of `qtorch train`: a composed configuration becomes a run and a result."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qtorch.cli.hydra_errors import check_complete, explain
from qtorch.cli.isolation import close_lost, hint, in_own_process, isolated
from qtorch.cli.submitted import do_as_submitted, submitted
from qtorch.cli.sweep import (
    FAILED,
    KILLED,
    RESULT_FILE,
    JobResult,
    note_here,
    stored_result,
)
from qtorch.cli.sweep_start import SWEEP_VARIABLE, plain_words, the_sweep
from qtorch.cli.work import LOCAL, POOL, note_failure, print_failure, store, work
from qtorch.core.errors import ConfigError, unknown_name
from qtorch.core.instantiate import plain
from qtorch.task.forked import Ended

RUNNERS = (LOCAL, POOL)


def run_job(config: DictConfig) -> None:
    """Train what the configuration describes; never raises but for an interruption.

    Hydra drops what jobs return and stops a sweep at the first exception, so that the result, a
    failure too, is stored in the job's folder and printed by the command at its end. Called in
    the launcher's process, which may do several jobs: the work is done in one of its own.
    """
    result = _result(config)
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        settings = _prepared(config)
        request = _request(config, settings, result, folder)
        launcher, sweep = str(HydraConfig.get().launcher._target_), request["sweep"] is not None
        apart = settings["runner"] == LOCAL and isolated(
            settings["sweep"]["isolate"], launcher, sweep=sweep
        )
    except Exception as error:
        note_failure(result, error)
        store(result, folder)
        print_failure(result)
        return
    if not apart:
        if submitted(launcher):
            do_as_submitted(lambda: work(request))
        else:
            work(request)
        return
    ended, run = in_own_process(request, Path(str(HydraConfig.get().sweep.dir)).resolve())
    told = stored_result(folder / RESULT_FILE)
    if told is None:
        _note_lost(result, ended, run)
        store(result, folder)
        if result.status == FAILED:
            print_failure(result)
    else:
        note_here(told)
    if (told or result).status == KILLED and (not sweep or the_sweep() is not None):
        raise KeyboardInterrupt((told or result).error)


def _request(
    config: DictConfig, settings: dict[str, Any], result: JobResult, folder: Path
) -> dict[str, Any]:
    """All that `work` needs, as plain data: it may be another process that does it."""
    hydra = HydraConfig.get()
    return {
        "settings": settings,
        "number": result.number,
        "overrides": result.overrides,
        "folder": str(folder.resolve()),
        "model": hydra.runtime.choices.get("model"),
        "resume": _resumed_run(settings, list(hydra.overrides.task)),
        "sweep": os.environ.get(SWEEP_VARIABLE) if hydra.mode == RunMode.MULTIRUN else None,
    }


def _note_lost(result: JobResult, ended: Ended, run: Mapping[str, Any] | None) -> None:
    """The result of a job whose process left none."""
    if ended.refused:
        result.status, result.error = KILLED, "Nothing had been started."
        return
    result.status = FAILED
    result.error = f"the job's process {ended.how}{hint(ended)}."
    if run is not None:
        result.run_id = run["recorder_id"]
        close_lost(run, result.error)


def _prepared(config: DictConfig) -> dict[str, Any]:
    """The settings as plain data; logging and the tracking store as they say."""
    try:
        check_complete(config)
        settings: dict[str, Any] = plain(config)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error
    if settings["runner"] not in RUNNERS:
        raise ConfigError(unknown_name("runner", str(settings["runner"]), RUNNERS))
    return settings


def _resumed_run(settings: Mapping[str, Any], overrides: Sequence[str]) -> str | None:
    """The run that `resume=ID` or `run=ID resume=true` names."""
    resume, run = settings.get("resume"), settings.get("run")
    if resume is None or resume is False:
        if run is not None:
            raise ConfigError(f"run={run} is given without resume=true; say resume={run}.")
        return None
    named = run if resume is True else resume
    if named is None:
        raise ConfigError(
            "resume=true needs the run's id: resume=RUN_ID, or run=RUN_ID resume=true."
        )
    other = [
        o
        for o in overrides
        if not o.lstrip("+").startswith(("resume=", "run=", "tracking", "log_level=", "sweep."))
    ]
    if other:
        raise ConfigError(
            f"a resumed run goes on with its own task, so {', '.join(other)} would not count; "
            "leave it out, or start a new run."
        )
    return str(named)


def _result(config: DictConfig) -> JobResult:
    hydra = HydraConfig.get()
    number = int(hydra.job.num) if not OmegaConf.is_missing(hydra.job, "num") else 0
    return JobResult(number, plain_words(hydra.overrides.task), FAILED, 0.0)
