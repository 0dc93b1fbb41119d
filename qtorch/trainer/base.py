"""The interface of trainers, which train lists of tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from qtorch.tracking.recorder import Recorder

Task = Mapping[str, Any]


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


def as_list(items: Any, single: type) -> list[Any]:
    """Return the items as a list; a single item becomes a list of one."""
    return [items] if isinstance(items, single) else list(items)
