"""One job of `qtorch train`: a composed configuration becomes a run and a result."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qtorch.cli import table
from qtorch.cli.guard import debugging, error_line
from qtorch.cli.hydra_errors import check_complete, explain
from qtorch.cli.segments import with_dates
from qtorch.cli.sweep import FAILED, FINISHED, KILLED, SENT, JobResult
from qtorch.core.errors import ConfigError, unknown_name
from qtorch.core.instantiate import plain
from qtorch.core.runtime import configure_logging
from qtorch.core.session import init
from qtorch.tracking.r import R
from qtorch.tracking.recorder import Recorder
from qtorch.trainer.failure import started_runs
from qtorch.trainer.run import end_task_train, task_train

log = logging.getLogger(__name__)

LOCAL, POOL = "local", "rm"
RUNNERS = (LOCAL, POOL)


def run_job(config: DictConfig) -> None:
    """Train what the configuration describes; never raises but for an interruption.

    Hydra drops what jobs return and stops a sweep at the first exception, so that the result, a
    failure too, is stored in the job's folder and printed by the command at its end.
    """
    begin = time.perf_counter()
    with started_runs() as runs:
        result = _result(config)
        try:
            settings = _prepared(config)
            if settings["runner"] == LOCAL:
                recorder = _train(settings)
                result.status = FINISHED
                result.metrics = recorder.list_metrics()
            else:
                result.sent = _send(settings)
                result.status = SENT
        except (KeyboardInterrupt, SystemExit) as stop:
            result.status = KILLED
            message = _how_to_resume(runs, stop)
            result.error = message
            raise KeyboardInterrupt(message) from stop
        except Exception as error:
            if debugging():
                log.error("the job failed", exc_info=error)
            result.error = error_line(error)
        finally:
            result.seconds = time.perf_counter() - begin
            if runs:
                run = runs[-1]
                result.run_id = run.id
                result.experiment = getattr(run, "experiment_name", None)
            _store(result)
    if result.status == FINISHED:
        table.print_summary(result, recorder)
    elif result.status != SENT and not OmegaConf.is_missing(HydraConfig.get().job, "num"):
        print(f"job {result.number} failed: {result.error}", file=sys.stderr)


def _prepared(config: DictConfig) -> dict[str, Any]:
    """The settings as plain data; logging and the tracking store as they say."""
    try:
        check_complete(config)
        settings: dict[str, Any] = plain(config)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error
    configure_logging(settings["log_level"])
    _quiet_libraries()
    uri = (settings["tracking"] or {}).get("uri")
    if uri is not None:
        init(tracking_uri=uri)
    if settings["runner"] not in RUNNERS:
        raise ConfigError(unknown_name("runner", str(settings["runner"]), RUNNERS))
    return settings


def _train(settings: Mapping[str, Any]) -> Recorder:
    resumed = _resumed_run(settings)
    if resumed is not None:
        recorder = R.get_recorder(recorder_id=resumed)
        if recorder.status == FINISHED:
            raise ConfigError(f"run {resumed} is {FINISHED}: there is nothing to go on with.")
        return end_task_train(recorder)
    return task_train(with_dates(settings["task"]), settings["experiment_name"], _name(settings))


def _send(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Put the job's task into a pool; where it is then."""
    from qtorch.task.manager import TaskManager
    from qtorch.trainer.pooled import pool_definition

    if _resumed_run(settings) is not None:
        raise ConfigError("a run is resumed here (runner=local); a pool resumes its own tasks.")
    task, experiment = with_dates(settings["task"]), settings["experiment_name"]
    pool = settings["pool"] or experiment
    manager = TaskManager(pool, settings["url"])
    (id,) = manager.create_task([pool_definition(task, experiment, _name(settings))])
    return {"id": id, "pool": pool, "url": manager.url, "wait": bool(settings["wait"])}


def _name(settings: Mapping[str, Any]) -> str | None:
    """The run's name: the given one, else the choice of the model."""
    name = settings["run_name"] or HydraConfig.get().runtime.choices.get("model")
    return None if name is None else str(name)


def _quiet_libraries() -> None:
    """What libraries say that is no news, or that they raise as an error too."""
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning's own use of torch
    if not debugging():
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL + 1)


def _resumed_run(settings: Mapping[str, Any]) -> str | None:
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
        for o in HydraConfig.get().overrides.task
        if not o.lstrip("+").startswith(("resume=", "run=", "tracking", "log_level="))
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
    return JobResult(number, list(hydra.overrides.task), FAILED, 0.0)


def _store(result: JobResult) -> None:
    try:
        result.store(Path(HydraConfig.get().runtime.output_dir))
    except OSError as error:
        log.warning("the job's result cannot be written: %s", error)


def _how_to_resume(runs: list[Recorder], stop: BaseException) -> str:
    """Which run was stopped, what of it is kept, and the command that goes on with it."""
    if not runs:
        return "Nothing had been started."
    run = runs[-1]
    where = getattr(stop, "checkpoint", None) or _checkpoint_of(run)
    kept = f"the checkpoint {where} is kept" if where else "it had not come to a checkpoint yet"
    how = "Resume it with" if where else "Begin it again, in the same run, with"
    return f"Run {run.id} is {KILLED}; {kept}. {how}: qtorch train resume={run.id}"


def _checkpoint_of(run: Recorder) -> str | None:
    from qtorch.model.checkpoint import LAST  # with Lightning, which a job may not have needed yet

    path = run.checkpoint_dir() / LAST
    return str(path) if path.is_file() else None
