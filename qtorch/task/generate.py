"""Generators that make several tasks from one, and their combination."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from qtorch.core.configured import plain_value
from qtorch.core.instantiate import plain
from qtorch.task.adjust import TimeAdjuster
from qtorch.task.parts import task_segments, task_source, with_segments

TaskDef = Mapping[str, Any]


class TaskGen(ABC):
    """Generates several tasks from one, without modifying it. Calling it calls `generate`.

    Corresponds to qlib/workflow/task/gen.py.
    """

    @abstractmethod
    def generate(self, task: TaskDef) -> list[dict[str, Any]]:
        """Generate tasks from `task`."""

    def __call__(self, task: TaskDef) -> list[dict[str, Any]]:
        return self.generate(task)


def task_generator(
    tasks: TaskDef | Sequence[TaskDef], generators: TaskGen | Sequence[TaskGen]
) -> list[dict[str, Any]]:
    """Apply generators one after another, each to all tasks of the previous one.

    For example, 3 tasks and generators of 2 and 3 tasks each make 18 tasks. A single task or
    generator counts as a list of one.
    """
    generated_tasks = [dict(t) for t in ([tasks] if isinstance(tasks, Mapping) else tasks)]
    for generator in [generators] if isinstance(generators, TaskGen) else generators:
        generated_tasks = [new for task in generated_tasks for new in generator.generate(task)]
    return generated_tasks


class MultiHorizonGenBase(TaskGen):
    """Generates one task per label horizon; a subclass implements `set_horizon`.

    `label_leak_n` is the number of days after the prediction until a label of horizon 0 would be
    known: 2 if shares are bought on the next day and sold the day after. Each task's other
    segments end `horizon + label_leak_n` trading days before its test segment. `calendar` is that
    of TimeAdjuster; by default the calendar of the task's source.
    """

    def __init__(
        self,
        horizon: Iterable[int] = (5,),
        label_leak_n: int = 2,
        *,
        calendar: Sequence[Any] | pd.DatetimeIndex | None = None,
        test_key: str = "test",
    ) -> None:
        self.horizon = [int(h) for h in horizon]
        self.label_leak_n = label_leak_n
        self.calendar = calendar
        self.test_key = test_key

    @abstractmethod
    def set_horizon(self, task: dict[str, Any], hr: int) -> None:
        """Set the horizon of `task`, which is a copy that may be modified."""

    def generate(self, task: TaskDef) -> list[dict[str, Any]]:
        """Generate one task per horizon, in their order."""
        generated_tasks = []
        adjuster = build_adjuster(task, self.calendar)
        for horizon in self.horizon:
            new = copy_task(task)
            self.set_horizon(new, horizon)
            segments = adjuster.align_seg(task_segments(new))
            days = horizon + self.label_leak_n
            segments = truncate_segments(adjuster, segments, days, self.test_key)
            generated_tasks.append(with_segments(new, segments_to_text(segments)))
        return generated_tasks


def truncate_segments(
    adjuster: TimeAdjuster, segments: Mapping[str, Any], days: int, test_key: str = "test"
) -> dict[str, Any]:
    """Truncate all segments but the test's to end `days` trading days before the test begins."""
    starts = [t for t in segments[test_key] if t is not None]
    test_start = min(starts, key=pd.Timestamp)
    return {
        name: span if name == test_key else adjuster.truncate(span, test_start, days)
        for name, span in segments.items()
    }


def build_adjuster(
    task: TaskDef, calendar: Sequence[Any] | pd.DatetimeIndex | None = None
) -> TimeAdjuster:
    """Build a TimeAdjuster on a calendar, by default on that of the task's source."""
    return TimeAdjuster(
        calendar=calendar, source=None if calendar is not None else task_source(task)
    )


def segments_to_text(segments: Mapping[str, Any]) -> dict[str, list[str | None]]:
    """Convert segments to plain data with dates as text, as in a task (Qlib has Timestamps)."""
    return {name: [plain_value(date) for date in span] for name, span in segments.items()}


def copy_task(task: TaskDef) -> dict[str, Any]:
    """Return a deep copy of a task."""
    new: dict[str, Any] = copy.deepcopy(dict(plain(task)))
    return new
