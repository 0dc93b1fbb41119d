"""The trainer that fits many tasks at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from qtorch.model.fleet.fleet import Fleet
from qtorch.tracking.recorder import Recorder
from qtorch.trainer.run import task_train
from qtorch.trainer.trainers import TrainerR, TrainFunction


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

    def _run_all(self, runs: Sequence[Callable[[], Recorder]]) -> Iterator[Recorder]:
        for job in Fleet(self.max_members).run(runs):
            if job.error is not None:
                raise job.error
            assert job.result is not None
            yield job.result
