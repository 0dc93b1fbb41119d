"""Continue a rolling study that was interrupted: its run, and the runs of its windows."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from qtorch.core.errors import ConfigError
from qtorch.core.identity import digest
from qtorch.study.sweep_job import SweepMember, run_sweep_job
from qtorch.task.rolling import task_segments
from qtorch.tracking.claims import has_lost_process
from qtorch.tracking.manager import R
from qtorch.tracking.recorder import Recorder, with_run_tags
from qtorch.trainer.run import task_train
from qtorch.trainer.trainers import Trainer, TrainerR, TrainFunction

log = logging.getLogger(__name__)

STUDY_TAG = "rolling.study"  # identifies a study's tasks and options
WINDOW_TAG, SPAN_TAG = "rolling.window", "rolling.test"
TEST = "test"


def identify_study(
    base: Mapping[str, Any],
    tasks: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
    seed: int | None,
) -> str | None:
    """Return the ID of a study; None if it has live objects, which cannot be compared.

    `base` is the task that the windows come from, `seed` the seed that the user has set. A seed
    that was drawn at random does not count.
    """
    parts = [{k: v for k, v in task.items() if k != "seed"} for task in (base, *tasks)]
    try:
        return digest({"tasks": parts, "options": dict(options), "seed": seed})
    except ConfigError:
        return None


def keeps_windows(trainer: Trainer) -> bool:
    """Whether a trainer does not repeat the windows that an interrupted study has finished.

    A task pool knows its finished tasks. Other trainers must use our training function.
    """
    if trainer.has_worker():
        return True
    return _trains_by_function(trainer)


def _trains_by_function(trainer: Trainer) -> bool:
    is_usual = type(trainer).train is TrainerR.train
    return is_usual and isinstance(trainer, TrainerR) and trainer.train_func is task_train


def find_interrupted_study(study_id: str, experiment_name: str | None) -> Recorder | None:
    """Return the newest run of a study that did not finish and that no process works on."""
    from qtorch.tracking.mlflow_store import open_store

    uri = R.get_uri()
    experiment = R.get_exp(experiment_name=experiment_name)
    condition = f"tags.`{STUDY_TAG}` = '{study_id}'"
    for row in open_store(uri).runs([experiment.id], filter_string=condition):
        is_stopped = row.status in (Recorder.STATUS_K, Recorder.STATUS_FA)
        if is_stopped or has_lost_process(row, uri):
            log.info("continuing the interrupted study of run %s", row.id)
            return R.get_recorder(recorder_id=row.id)
    return None


def window_options(
    trainer: Trainer, study_run_id: str, tasks: Sequence[Mapping[str, Any]]
) -> dict[str, TrainFunction]:
    """Return the options of `trainer.train` with which finished windows are not trained again."""
    if not _trains_by_function(trainer):
        return {}
    numbers = {_span(task): number for number, task in enumerate(tasks)}
    return {"train_func": partial(_train_window, study_run_id=study_run_id, numbers=numbers)}


def _train_window(
    task: Mapping[str, Any],
    experiment_name: str | None = None,
    recorder_name: str | None = None,
    *,
    study_run_id: str,
    numbers: Mapping[str, int],
) -> Recorder:
    """Train a window as a job of the study: a finished run is used, a stopped one is resumed."""
    span = _span(task)
    member = SweepMember(study_run_id, numbers[span], (f"{TEST}={span}",), retry=True, reuse=False)
    with with_run_tags({WINDOW_TAG: str(numbers[span]), SPAN_TAG: span}):
        return run_sweep_job(task, member, experiment_name, recorder_name).recorder


def _span(task: Mapping[str, Any]) -> str:
    """Return the first and the last date of a task's test segment as text."""
    start, end = task_segments(task)[TEST]
    return f"{start}..{end}"
