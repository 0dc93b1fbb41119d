"""Many tasks from few: generators, and how they are combined."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from qtorch.core.configured import plain_value
from qtorch.core.instantiate import plain
from qtorch.task.adjust import TimeAdjuster
from qtorch.task.parts import segments_of, source_of, with_segments

TaskDef = Mapping[str, Any]


class TaskGen(ABC):
    """Makes tasks from one; calling it is `generate`. Answers to qlib/workflow/task/gen.py.

    What it is given stays as it is.
    """

    @abstractmethod
    def generate(self, task: TaskDef) -> list[dict[str, Any]]:
        """The tasks made from `task`."""

    def __call__(self, task: TaskDef) -> list[dict[str, Any]]:
        return self.generate(task)


def task_generator(
    tasks: TaskDef | Sequence[TaskDef], generators: TaskGen | Sequence[TaskGen]
) -> list[dict[str, Any]]:
    """Each generator applied to what the ones before it made: 3 tasks, 2 and 3 from each, are 18.

    One bare task or generator is a list of one.
    """
    made = [dict(t) for t in ([tasks] if isinstance(tasks, Mapping) else tasks)]
    for each in [generators] if isinstance(generators, TaskGen) else generators:
        made = [new for task in made for new in each.generate(task)]
    return made


class MultiHorizonGenBase(TaskGen):
    """One task for each horizon of the label; a subclass says in `set_horizon` how.

    `label_leak_n`: days after the prediction until a label of horizon 0 would be known: 2 for
    "bought tomorrow, sold the day after". Each task's segments end `horizon + label_leak_n`
    trading days before its test segment. `calendar`: as TimeAdjuster's; None is the task's own.
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
        """Change a task, which is a copy, to a horizon."""

    def generate(self, task: TaskDef) -> list[dict[str, Any]]:
        """One task a horizon, in their order."""
        made = []
        adjuster = adjuster_of(task, self.calendar)
        for horizon in self.horizon:
            new = copy_of(task)
            self.set_horizon(new, horizon)
            segments = adjuster.align_seg(segments_of(new))
            days = horizon + self.label_leak_n
            segments = truncated(adjuster, segments, days, self.test_key)
            made.append(with_segments(new, as_text(segments)))
        return made


def truncated(
    adjuster: TimeAdjuster, segments: Mapping[str, Any], days: int, test_key: str = "test"
) -> dict[str, Any]:
    """The segments, all but the test's cut to end `days` trading days before the test begins."""
    starts = [t for t in segments[test_key] if t is not None]
    begin = min(starts, key=pd.Timestamp)
    return {
        name: span if name == test_key else adjuster.truncate(span, begin, days)
        for name, span in segments.items()
    }


def adjuster_of(
    task: TaskDef, calendar: Sequence[Any] | pd.DatetimeIndex | None = None
) -> TimeAdjuster:
    """The adjuster on a given calendar, else on that of the task's source."""
    return TimeAdjuster(calendar=calendar, source=None if calendar is not None else source_of(task))


def as_text(segments: Mapping[str, Any]) -> dict[str, list[str | None]]:
    """Segments as a task holds them: plain data, dates as text (Qlib keeps Timestamps)."""
    return {name: [plain_value(date) for date in span] for name, span in segments.items()}


def copy_of(task: TaskDef) -> dict[str, Any]:
    """A copy of a task of which everything may be changed."""
    made: dict[str, Any] = copy.deepcopy(dict(plain(task)))
    return made
