"""The trainer that fits many tasks at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from qtorch.model.fleet.fleet import Fleet
from qtorch.tracking.recorder import Recorder
from qtorch.trainer.run import task_train
from qtorch.trainer.trainers import Task, TrainerR, TrainFunction, as_list, log_failures


class FleetTrainer(TrainerR):
    """Trains tasks at once whose models have one architecture, each in its own run.

    Seeds, learning rates and rolling windows of one network are trained as one batched program on
    one device; each run has its own params, curves, best weights, checkpoint, predictions and
    records, as if its task had been trained by itself (see `qtorch.model.fit_fleet`). Tasks with
    equal datasets share one dataset. Tasks that cannot be trained together are trained one after
    another. As with TrainerR, a failed task's run is marked FAILED and the others go on.

    `max_members`: how many tasks are trained at once; None: as many as the memory bears, on a CPU
    at most 64. `train_func` must call `fit` in this process. Qlib has no such trainer.
    """

    def __init__(
        self,
        experiment_name: str | None = None,
        train_func: TrainFunction = task_train,
        default_rec_name: str | None = None,
        *,
        max_members: int | None = None,
    ) -> None:
        super().__init__(experiment_name, train_func, default_rec_name=default_rec_name)
        self.max_members = max_members

    def train(
        self,
        tasks: Task | Sequence[Task],
        train_func: TrainFunction | None = None,
        experiment_name: str | None = None,
    ) -> list[Recorder]:
        """Train all tasks; return the recorders in task order, failed ones with status FAILED."""
        name = experiment_name or self.experiment_name
        function = train_func or self.train_func
        jobs = Fleet(self.max_members).run(
            [
                partial(self._run, function, task, name, recorder_name=self.default_rec_name)
                for task in as_list(tasks, Mapping)
            ]
        )
        recorders: list[Recorder] = []
        for job in jobs:
            if job.error is not None:
                raise job.error
            assert job.result is not None
            recorder = job.result
            if recorder.status != Recorder.STATUS_FA:
                recorder.set_tags(**{self.STATUS_KEY: self.STATUS_BEGIN})
            recorders.append(recorder)
        log_failures(recorders)
        return recorders
