"""Trainers that keep their results in runs: at once, or in two phases."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from qtorch.core.errors import TrackingError
from qtorch.core.runtime import progress
from qtorch.tracking.r import R
from qtorch.tracking.recorder import Recorder
from qtorch.trainer.base import Task, Trainer, as_list
from qtorch.trainer.failure import error_of, one_line, record_failure, started_runs
from qtorch.trainer.isolated import Isolation
from qtorch.trainer.run import begin_task_train, end_task_train, task_train

log = logging.getLogger(__name__)

TrainFunction = Callable[..., Recorder]


class TrainerR(Trainer):
    """Trains tasks one after another, each in a run of its own.

    `train_func(task, experiment_name, recorder_name=...)` returns the run. With
    `call_in_subproc` each task gets one process, forked with its imports done, whose memory goes
    when it ends. A task that fails leaves its run FAILED with its error and the others go on; the
    recorders come back in the order of the tasks, and a warning at the end lists the failed ones.
    A tracking store that does not answer ends the list, for nothing could be recorded.

    Answers to qlib/model/trainer.py, where `call_in_subproc` wraps the second task's process
    around the first's, and where the first failing task ends the list.
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
        """Run every task; the recorders in the tasks' order, failed ones with status FAILED."""
        name = experiment_name or self.experiment_name
        function = train_func or self.train_func
        recorders = []
        with self._calls() as call:
            for task in progress(as_list(tasks, Mapping), "train tasks"):
                recorder = self._run(
                    call, function, task, name, recorder_name=self.default_rec_name
                )
                if recorder.status != Recorder.STATUS_FA:
                    recorder.set_tags(**{self.STATUS_KEY: self.STATUS_BEGIN})
                recorders.append(recorder)
        warn_of_failures(recorders)
        return recorders

    def end_train(self, models: Recorder | Sequence[Recorder]) -> list[Recorder]:
        """Mark the runs as ended; a failed one stays as it is."""
        recorders = as_list(models, Recorder)
        for recorder in recorders:
            if recorder.status != Recorder.STATUS_FA:
                recorder.set_tags(**{self.STATUS_KEY: self.STATUS_END})
        return recorders

    def _calls(self) -> AbstractContextManager[Callable[..., Recorder]]:
        """How a function is called, inside the block: here, or in a process of its own."""
        return Isolation() if self.call_in_subproc else nullcontext(operator.call)

    def _run(
        self,
        call: Callable[..., Recorder],
        function: TrainFunction,
        first: Any,
        experiment_name: str | None,
        **options: Any,
    ) -> Recorder:
        """One call of a training function; its run, also where it failed."""
        with started_runs() as runs:
            try:
                return call(function, first, experiment_name, **options)
            except Exception as error:
                log.error("a task failed: %s", one_line(error), exc_info=error)
                if runs:
                    return runs[-1]
                if isinstance(error, TrackingError):
                    raise
                if isinstance(first, Recorder):
                    record_failure(first, error)
                    first.end_run(Recorder.STATUS_FA)
                    return first
                return failed_run(experiment_name, error, **options)


class DelayTrainerR(TrainerR):
    """Prepares in `train` (a run that holds its task) and fits in `end_train`.

    The two may lie in different processes: what `end_train` needs is in the runs. A run that has
    ended already is skipped.
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
        """Fit what is not yet fitted; the recorders in the order given."""
        name = experiment_name or self.experiment_name
        function = end_train_func or self.end_train_func
        ended: list[Recorder] = []
        with self._calls() as call:
            for given in progress(as_list(models, Recorder), "train tasks"):
                status = given.list_tags().get(self.STATUS_KEY)
                # Ended already; or, without the tag, its preparation failed: as the store has it.
                recorder: Recorder = R.get_recorder(recorder_id=given.id)
                if status is not None and status != self.STATUS_END:
                    recorder = self._run(call, function, given, name)
                    if recorder.status != Recorder.STATUS_FA:
                        recorder.set_tags(**{self.STATUS_KEY: self.STATUS_END})
                ended.append(recorder)
        warn_of_failures(ended)
        return ended


def failed_run(
    experiment_name: str | None, error: Exception, recorder_name: str | None = None
) -> Recorder:
    """A run for a task that failed before it had one (its definition is wrong, say)."""
    R.start_exp(experiment_name=experiment_name, recorder_name=recorder_name)
    recorder = R.get_recorder()
    try:
        record_failure(recorder, error)
    finally:
        R.end_exp(recorder_status=Recorder.STATUS_FA)
    return recorder


def warn_of_failures(recorders: Sequence[Recorder]) -> None:
    """One warning that lists the failed runs and their errors."""
    failed = [r for r in recorders if r.status == Recorder.STATUS_FA]
    if failed:
        lines = "".join(f"\n  run {r.id}: {error_of(r)}" for r in failed)
        log.warning("%d of %d tasks failed:%s", len(failed), len(recorders), lines)
