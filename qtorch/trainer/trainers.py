"""Trainers that record each task as a run, in one or in two phases."""

from __future__ import annotations

import logging
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from qtorch.core.errors import TrackingError
from qtorch.core.plain import resolve_config
from qtorch.core.runtime import progress
from qtorch.tracking.manager import R
from qtorch.tracking.recorder import Recorder
from qtorch.trainer.failure import collect_started_runs, error_summary, get_error, record_failure
from qtorch.trainer.run import begin_task_train, end_task_train, task_train
from qtorch.trainer.subprocess_tasks import train_in_child

Task = Mapping[str, Any]
TrainFunction = Callable[..., Recorder]

log = logging.getLogger(__name__)


class Trainer(ABC):
    """Trains a list of tasks in two phases, `train` and `end_train`; calling it runs both.

    A delayed trainer only prepares the runs in `train` and fits in `end_train`; other trainers fit
    in `train`. Corresponds to qlib/model/trainer.py.
    """

    delay = False

    @abstractmethod
    def train(self, tasks: Task | Sequence[Task]) -> list[Recorder]:
        """First phase: return one recorder per task, in order. A single task counts as a list."""

    def end_train(self, models: Recorder | Sequence[Recorder]) -> list[Recorder]:
        """Second phase: take the recorders returned by `train`, finish them and return them."""
        return as_list(models, Recorder)

    def __call__(self, tasks: Task | Sequence[Task]) -> list[Recorder]:
        return self.end_train(self.train(tasks))

    def is_delay(self) -> bool:
        """Whether fitting happens in `end_train`."""
        return self.delay

    def has_worker(self) -> bool:
        """Whether other processes can share the work by calling `worker`."""
        return False

    def worker(self) -> bool:
        """Work on the tasks of the same trainer that was started in another process."""
        raise NotImplementedError(
            f"{type(self).__name__} has no workers; use a trainer with a task pool, such as "
            "TrainerRM."
        )


class TrainerR(Trainer):
    """Trains tasks one after another, each in its own run.

    `train_func(task, experiment_name, recorder_name=...)` returns the run. With `call_in_subproc`
    each task runs in its own process, forked with all imports done, so that its memory is released
    at its end. If a task fails, its run is marked FAILED with the error and the other tasks go on;
    recorders are returned in the order of the tasks, and a final warning lists the failed ones. An
    unavailable tracking store stops the list, because nothing could be recorded.

    Corresponds to qlib/model/trainer.py. Differences: Qlib's `call_in_subproc` nests each task's
    process inside that of the previous task, and Qlib stops at the first failing task.
    """

    STATUS_KEY = "train_status"
    STATUS_BEGIN = "begin_task_train"
    STATUS_END = "end_task_train"

    def __init__(
        self,
        experiment_name: str | None = None,
        train_func: TrainFunction = task_train,
        call_in_subproc: bool = False,
        default_rec_name: str | None = None,
    ) -> None:
        self.experiment_name = experiment_name
        self.train_func = train_func
        self.call_in_subproc = call_in_subproc
        self.default_rec_name = default_rec_name

    def train(
        self,
        tasks: Task | Sequence[Task],
        train_func: TrainFunction | None = None,
        experiment_name: str | None = None,
    ) -> list[Recorder]:
        """Train all tasks; return the recorders in task order, failed ones with status FAILED."""
        name = experiment_name or self.experiment_name
        function = train_func or self.train_func
        runs = [
            partial(self._run, function, task, name, recorder_name=self.default_rec_name)
            for task in as_list(tasks, Mapping)
        ]
        recorders = []
        for recorder in self._run_all(runs):
            if recorder.status != Recorder.STATUS_FA:
                recorder.set_tags(**{self.STATUS_KEY: self.STATUS_BEGIN})
            recorders.append(recorder)
        log_failures(recorders)
        return recorders

    def _run_all(self, runs: Sequence[Callable[[], Recorder]]) -> Iterator[Recorder]:
        """Train each task by its function, and yield the recorders in order."""
        for run in progress(runs, "train tasks"):
            yield run()

    def end_train(self, models: Recorder | Sequence[Recorder]) -> list[Recorder]:
        """Mark the runs as ended; failed runs stay unchanged."""
        recorders = as_list(models, Recorder)
        for recorder in recorders:
            if recorder.status != Recorder.STATUS_FA:
                recorder.set_tags(**{self.STATUS_KEY: self.STATUS_END})
        return recorders

    def _run(
        self,
        function: TrainFunction,
        first: Any,
        experiment_name: str | None,
        **options: Any,
    ) -> Recorder:
        """Call a training function and return its run, even if it failed."""
        call = train_in_child if self.call_in_subproc else operator.call
        with collect_started_runs() as runs:
            try:
                return call(function, first, experiment_name, **options)
            except Exception as error:
                log.error("task failed: %s", error_summary(error), exc_info=error)
                if runs:
                    return runs[-1]
                if isinstance(error, TrackingError):
                    raise
                if isinstance(first, Recorder):
                    record_failure(first, error)
                    first.end_run(Recorder.STATUS_FA)
                    return first
                return create_failed_run(experiment_name, error, **options)


class DelayTrainerR(TrainerR):
    """Creates the runs with their tasks in `train`, and fits them in `end_train`.

    The two phases may happen in different processes, because all that `end_train` needs is stored
    in the runs. Runs that have already ended are skipped.
    """

    delay = True

    def __init__(
        self,
        experiment_name: str | None = None,
        train_func: TrainFunction = begin_task_train,
        end_train_func: TrainFunction = end_task_train,
        call_in_subproc: bool = False,
        default_rec_name: str | None = None,
    ) -> None:
        super().__init__(experiment_name, train_func, call_in_subproc, default_rec_name)
        self.end_train_func = end_train_func

    def end_train(
        self,
        models: Recorder | Sequence[Recorder],
        end_train_func: TrainFunction | None = None,
        experiment_name: str | None = None,
    ) -> list[Recorder]:
        """Fit the runs that are not fitted yet; return the recorders in the same order."""
        name = experiment_name or self.experiment_name
        function = end_train_func or self.end_train_func
        results: list[Recorder] = []
        for prepared_run in progress(as_list(models, Recorder), "train tasks"):
            status = prepared_run.list_tags().get(self.STATUS_KEY)
            # A run that has already ended, or without the tag (its preparation failed), is
            # returned as stored.
            recorder: Recorder = R.get_recorder(recorder_id=prepared_run.id)
            if status is not None and status != self.STATUS_END:
                recorder = self._run(function, prepared_run, name)
                if recorder.status != Recorder.STATUS_FA:
                    recorder.set_tags(**{self.STATUS_KEY: self.STATUS_END})
            results.append(recorder)
        log_failures(results)
        return results


def create_failed_run(
    experiment_name: str | None, error: Exception, recorder_name: str | None = None
) -> Recorder:
    """Create a failed run for a task that failed before it had a run (e.g. an invalid task)."""
    R.start_exp(experiment_name=experiment_name, recorder_name=recorder_name)
    recorder = R.get_recorder()
    try:
        record_failure(recorder, error)
    finally:
        R.end_exp(recorder_status=Recorder.STATUS_FA)
    return recorder


def log_failures(recorders: Sequence[Recorder]) -> None:
    """Log one warning that lists the failed runs and their errors."""
    failed_runs = [r for r in recorders if r.status == Recorder.STATUS_FA]
    if failed_runs:
        lines = "".join(f"\n  run {r.id}: {get_error(r)}" for r in failed_runs)
        log.warning("%d of %d tasks failed:%s", len(failed_runs), len(recorders), lines)


def as_list(items: Any, single: type) -> list[Any]:
    """Return the items as a list; a single item becomes a list of one."""
    items = resolve_config(items)
    return [items] if isinstance(items, single) else list(items)
