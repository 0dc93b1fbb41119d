"""The work of one job, in whichever process it is done: train, keep, tell."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qtorch.cli import table
from qtorch.cli.guard import debugging, error_line
from qtorch.cli.scheduled import JOB_TAG, earlier_attempt, scheduled_job
from qtorch.cli.segments import with_dates
from qtorch.cli.sweep import FAILED, FINISHED, KILLED, RUNNING, SENT, JobResult
from qtorch.core.errors import ConfigError, QtorchError
from qtorch.core.runtime import configure_logging
from qtorch.core.session import init
from qtorch.study.sweep_job import (
    ELSEWHERE,
    REFUSED,
    SKIPPED,
    TRAINED,
    JobOutcome,
    Membership,
    identified,
    note_seconds,
    run_sweep_job,
)
from qtorch.tracking.lineage import born_with
from qtorch.tracking.r import R
from qtorch.tracking.recorder import Recorder
from qtorch.trainer.failure import started_runs
from qtorch.trainer.run import end_task_train, task_train

log = logging.getLogger(__name__)

LOCAL, POOL = "local", "rm"


def work(request: Mapping[str, Any]) -> None:
    """Do a job, in the process where this is called, and store its result in its folder."""
    begin = time.perf_counter()
    settings, folder = request["settings"], Path(request["folder"])
    result = JobResult(request["number"], list(request["overrides"]), FAILED, 0.0)
    with started_runs() as runs:
        try:
            configure(settings)
            if settings["runner"] == LOCAL:
                recorder = _train(request, result)
                if result.status == FINISHED:
                    result.metrics = recorder.list_metrics()
            else:
                result.sent = _send(request)
                result.status = SENT
        except (KeyboardInterrupt, SystemExit) as stop:
            result.status = KILLED
            result.error = _how_to_resume(runs, stop)
            raise KeyboardInterrupt(result.error) from stop
        except Exception as error:
            note_failure(result, error)
        finally:
            result.seconds = time.perf_counter() - begin
            if runs:
                run = runs[-1]
                result.run_id = run.id
                result.experiment = getattr(run, "experiment_name", None)
                _note_seconds(request, result, run)
            store(result, folder)
    if result.status == FINISHED and result.note == SKIPPED:
        print_skipped(result)
    elif result.status == FINISHED:
        table.print_summary(result, recorder, look=request["sweep"] is None)
    elif result.status == FAILED and request["sweep"] is not None:
        print_failure(result)


def note_failure(result: JobResult, error: Exception) -> None:
    """The job failed with this error."""
    if debugging():
        log.error("the job failed", exc_info=error)
    result.status, result.error = FAILED, error_line(error)


def _note_seconds(request: Mapping[str, Any], result: JobResult, run: Recorder) -> None:
    if request["sweep"] is None or result.note in (SKIPPED, ELSEWHERE, REFUSED):
        return
    try:
        note_seconds(run, result.seconds)
    except QtorchError as error:
        log.warning("the seconds are not noted in run %s: %s", run.id, error)


def print_failure(result: JobResult) -> None:
    """Say at once that a job failed; the command's end says it again."""
    print(f"job {result.number} failed: {result.error}", file=sys.stderr)


def print_skipped(result: JobResult) -> None:
    """Say that a job had been finished before."""
    print(f"job {result.number}: finished before, in run {result.run_id}", file=sys.stderr)


def configure(settings: Mapping[str, Any]) -> None:
    """Logging and the tracking store, as the settings say."""
    configure_logging(settings["log_level"])
    quiet_libraries()
    uri = (settings["tracking"] or {}).get("uri")
    if uri is not None:
        init(tracking_uri=uri)


def _train(request: Mapping[str, Any], result: JobResult) -> Recorder:
    """The run; `result` is told how it came about and whether it is finished."""
    settings, resumed = request["settings"], request["resume"]
    result.status = FINISHED
    if resumed is not None:
        recorder = R.get_recorder(recorder_id=resumed)
        if recorder.status == FINISHED:
            raise ConfigError(f"run {resumed} is {FINISHED}: there is nothing to go on with.")
        return end_task_train(recorder)
    task, experiment, name = (
        with_dates(settings["task"]),
        settings["experiment_name"],
        _name(request),
    )
    if request["sweep"] is None:
        tags = {} if task.get("seed") is None else identified(task)[1]
        job = scheduled_job()
        if job is not None and tags:
            tags[JOB_TAG] = job
        with born_with(tags):
            return task_train(task, experiment, name, run=earlier_attempt(experiment, tags))
    place = place_of(settings, request["sweep"], request["number"], request["overrides"])
    outcome = run_sweep_job(task, place, experiment, name)
    note_outcome(result, outcome)
    return outcome.recorder


def place_of(
    settings: Mapping[str, Any], sweep_id: str, number: int, overrides: Sequence[str]
) -> Membership:
    """A job's place in its sweep, and how the sweep is to go about it."""
    manner = settings["sweep"]
    return Membership(
        sweep_id,
        number,
        tuple(overrides),
        retry=bool(manner["retry"]),
        reuse=bool(manner["reuse"]),
    )


def note_outcome(result: JobResult, outcome: JobOutcome) -> None:
    """How the job of a sweep came about; FINISHED unless it is not."""
    result.status = FINISHED
    result.note = None if outcome.how == TRAINED else outcome.how
    if outcome.how == REFUSED:
        result.status, result.error = FAILED, outcome.error
    elif outcome.how == ELSEWHERE:
        result.status, result.error = RUNNING, outcome.error


def _send(request: Mapping[str, Any]) -> dict[str, Any]:
    """Put the job's task into a pool; where it is then."""
    from qtorch.task.manager import TaskManager
    from qtorch.trainer.pooled import pool_definition

    settings = request["settings"]
    if request["resume"] is not None:
        raise ConfigError("a run is resumed here (runner=local); a pool resumes its own tasks.")
    task, experiment = with_dates(settings["task"]), settings["experiment_name"]
    pool = settings["pool"] or experiment
    manager = TaskManager(pool, settings["url"])
    (id,) = manager.create_task([pool_definition(task, experiment, _name(request))])
    return {"id": id, "pool": pool, "url": manager.url, "wait": bool(settings["wait"])}


def _name(request: Mapping[str, Any]) -> str | None:
    """The run's name: the given one, else the choice of the model."""
    name = request["settings"]["run_name"] or request["model"]
    return None if name is None else str(name)


def quiet_libraries() -> None:
    """What libraries say that is no news, or that they raise as an error too."""
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning's own use of torch
    if not debugging():
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL + 1)


def store(result: JobResult, folder: Path) -> None:
    """Write the result; a disk that takes nothing more is no reason to lose it."""
    try:
        result.store(folder)
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
