"""Pools of tasks that survive what works on them, and tasks in series."""

from typing import TYPE_CHECKING

from qtorch.core.lazy import lazy_names

if TYPE_CHECKING:
    from qtorch.task.definition import Task as Task
    from qtorch.task.manager import TaskManager as TaskManager
    from qtorch.task.run import run_task as run_task

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "Task": "qtorch.task.definition",
        "TaskManager": "qtorch.task.manager",
        "run_task": "qtorch.task.run",
    },
)
