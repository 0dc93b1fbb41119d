"""What every trainer of a list of tasks answers to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from qtorch.tracking.recorder import Recorder

Task = Mapping[str, Any]


class Trainer(ABC):
    """Trains a list of tasks in two phases; calling it does both.

    A delayed trainer only prepares in `train` and fits in `end_train`; the others fit in `train`.
    Answers to qlib/model/trainer.py.
    """

    delay = False

    @abstractmethod
    def train(self, tasks: Task | Sequence[Task]) -> list[Recorder]:
        """The first phase: one recorder a task, in their order. One bare task is a list of one."""

    def end_train(self, models: Recorder | Sequence[Recorder]) -> list[Recorder]:
        """The second phase; takes what `train` gave and returns it."""
        return as_list(models, Recorder)

    def __call__(self, tasks: Task | Sequence[Task]) -> list[Recorder]:
        return self.end_train(self.train(tasks))

    def is_delay(self) -> bool:
        """Whether fitting happens in `end_train`."""
        return self.delay

    def has_worker(self) -> bool:
        """Whether other processes may take part through `worker`."""
        return False

    def worker(self) -> bool:
        """Take part in the work of the same trainer in another process."""
        raise NotImplementedError(
            f"{type(self).__name__} trains by itself and has no workers; a trainer with a task "
            "pool has."
        )


def as_list(items: Any, single: type) -> list[Any]:
    """A list of the items; one bare item is a list of one."""
    return [items] if isinstance(items, single) else list(items)
