"""Train tasks and record them as runs: single tasks, and trainers for lists of tasks."""

from typing import TYPE_CHECKING

from qtorch.core.lazy import lazy_names

if TYPE_CHECKING:
    from qtorch.trainer.fleet import FleetTrainer as FleetTrainer
    from qtorch.trainer.pooled import DelayTrainerRM as DelayTrainerRM
    from qtorch.trainer.pooled import TrainerRM as TrainerRM
    from qtorch.trainer.run import begin_task_train as begin_task_train
    from qtorch.trainer.run import end_task_train as end_task_train
    from qtorch.trainer.run import task_train as task_train
    from qtorch.trainer.trainers import DelayTrainerR as DelayTrainerR
    from qtorch.trainer.trainers import Trainer as Trainer
    from qtorch.trainer.trainers import TrainerR as TrainerR

__getattr__, __dir__ = lazy_names(__name__, __file__)
