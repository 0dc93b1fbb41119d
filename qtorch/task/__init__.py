"""Task pools that survive the failure of their workers, and generators of task series."""

from typing import TYPE_CHECKING

from qtorch.core.lazy import lazy_names

if TYPE_CHECKING:
    from qtorch.task.adjust import TimeAdjuster as TimeAdjuster
    from qtorch.task.definition import Task as Task
    from qtorch.task.manager import TaskManager as TaskManager
    from qtorch.task.rolling import MultiHorizonGenBase as MultiHorizonGenBase
    from qtorch.task.rolling import RollingGen as RollingGen
    from qtorch.task.rolling import TaskGen as TaskGen
    from qtorch.task.rolling import task_generator as task_generator
    from qtorch.task.run import current_task as current_task
    from qtorch.task.run import run_task as run_task

__getattr__, __dir__ = lazy_names(__name__, __file__)
