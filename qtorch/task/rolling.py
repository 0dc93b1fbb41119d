"""A task rolled through time: trained again every few days, tested on the days that follow."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from qtorch.core.configured import plain_value
from qtorch.core.errors import ConfigError, unknown_name
from qtorch.core.instantiate import plain
from qtorch.task.adjust import CalendarEndError, TimeAdjuster
from qtorch.task.generate import TaskDef, TaskGen, adjuster_of, as_text, truncated
from qtorch.task.parts import (
    FIT_END,
    FIT_START,
    dataset_of,
    handler_of,
    label_horizon,
    options_of,
    segments_of,
    with_handler,
    with_options,
)

log = logging.getLogger(__name__)


def handler_mod(task: dict[str, Any], rolling_gen: RollingGen) -> None:
    """Let the handler's data reach to the end of the test segment, if it ends before.

    A handler that is no configuration (a path, a live object) is left as it is.
    """
    given = options_of(handler_of(task))
    end = given.get("end_time")
    if end is None:
        return
    test_end = segments_of(task)[rolling_gen.test_key][1]
    if test_end is None or rolling_gen.ta.cal_interval(end, test_end) < 0:
        task.update(with_handler(task, end_time=test_end))


class RollingGen(TaskGen):
    """Tasks whose segments move on by `step` trading days, each tested on `step` days.

    `rtype` "expanding" keeps the start of the train segment, "sliding" its length; all other
    segments slide. The first test segment begins where the task's does, the last holds its end:
    it keeps its full length beyond that end (as in Qlib) unless `overshoot` is False.

    `trunc_days`: train and the others end that many trading days before the test begins; None is
    how far the task's label looks ahead (Qlib cuts nothing then). What a dataset purges for the
    same reason is not cut twice: it drops samples by where their label ends. 0 cuts nothing.

    `ds_extra_mod_func(task, rolling_gen)` may change each task; the default moves the handler's
    end. Fit windows (`fit_start_time`, `fit_end_time` of the handler and of its processors) keep
    their place in the train segment. `task_copy_func` copies the task; what lies outside its
    dataset's and handler's arguments is as that function gives it. `calendar`: as TimeAdjuster's;
    None is that of the task's source.

    Dates in the tasks are ISO text, so that they are plain data. Answers to
    qlib/workflow/task/gen.py.
    """

    ROLL_EX = TimeAdjuster.SHIFT_EX
    ROLL_SD = TimeAdjuster.SHIFT_SD

    def __init__(
        self,
        step: int = 40,
        rtype: str = ROLL_EX,
        ds_extra_mod_func: Callable[[dict[str, Any], RollingGen], None] | None = handler_mod,
        test_key: str = "test",
        train_key: str = "train",
        trunc_days: int | None = None,
        task_copy_func: Callable[[Any], Any] = copy.deepcopy,
        *,
        overshoot: bool = True,
        calendar: Sequence[Any] | pd.DatetimeIndex | None = None,
    ) -> None:
        if rtype not in (self.ROLL_EX, self.ROLL_SD):
            raise ConfigError(unknown_name("rtype", str(rtype), (self.ROLL_EX, self.ROLL_SD)))
        if int(step) < 1:
            raise ConfigError(f"step={step}: a window is tested on at least one trading day.")
        self.step, self.rtype = int(step), rtype
        self.ds_extra_mod_func = ds_extra_mod_func
        self.test_key, self.train_key = test_key, train_key
        self.trunc_days = trunc_days
        self.task_copy_func = task_copy_func
        self.overshoot = overshoot
        self.calendar = calendar
        self._adjuster: TimeAdjuster | None = None

    @property
    def ta(self) -> TimeAdjuster:
        """The adjuster on the calendar of the task that was rolled last."""
        if self._adjuster is None:
            self._adjuster = TimeAdjuster(calendar=self.calendar)
        return self._adjuster

    def generate(self, task: TaskDef) -> list[dict[str, Any]]:
        """The task's windows in their order; the first has the task's own train segment."""
        task = plain(task)
        self._adjuster = adjuster_of(task, self.calendar)
        given = segments_of(task)
        for key in (self.test_key, self.train_key):
            if key not in given:
                raise ConfigError(unknown_name("segment", key, given))
        segments = self.ta.align_seg(given)
        start, end = segments[self.test_key]
        if start is None:
            raise ConfigError("the test segment of a task that is rolled needs a start.")
        end = self.ta.max() if end is None else end
        segments[self.test_key] = self._first_test(start)
        days = label_horizon(task) if self.trunc_days is None else self.trunc_days
        if days is None:
            log.info("how far the label looks ahead is not known: no segment is cut; trunc_days=")
        elif days > 0:
            segments = truncated(self.ta, segments, days, self.test_key)
        before = self.ta.align_seg(given)[self.train_key]
        first = self._moved(task, before, segments, end)
        return [first, *self.gen_following_tasks(first, end)]

    def gen_following_tasks(self, task: TaskDef, test_end: Any) -> Iterator[dict[str, Any]]:
        """The windows behind `task`, itself left out, until one holds `test_end`."""
        if self._adjuster is None:
            self._adjuster = adjuster_of(task, self.calendar)
        base = segments = self.ta.align_seg(segments_of(task))
        last = pd.Timestamp(test_end)
        while True:
            try:
                segments = {name: self._shifted(name, span) for name, span in segments.items()}
            except CalendarEndError:
                return
            if segments[self.test_key][0] > last:
                return
            yield self._moved(task, base[self.train_key], segments, last)

    def _first_test(self, start: pd.Timestamp) -> tuple[Any, Any]:
        row = self.ta.align_idx(start)
        assert row is not None
        return self.ta.get(row), self.ta.get(row + self.step - 1)

    def _shifted(self, name: str, span: Any) -> Any:
        expands = name == self.train_key and self.rtype == self.ROLL_EX
        return self.ta.shift(span, self.step, self.ROLL_EX if expands else self.ROLL_SD)

    def _moved(
        self, task: TaskDef, train: Any, segments: Mapping[str, Any], end: pd.Timestamp
    ) -> dict[str, Any]:
        """A copy of the task on other segments.

        `train` is the segment that the task's fit windows are of, `end` the last test day.
        """
        new = dict(self.task_copy_func(task))
        start, last = segments[self.test_key]
        if not self.overshoot and (last is None or last > end):
            segments = {**segments, self.test_key: (start, end)}
        new["dataset"] = with_options(dataset_of(new), segments=as_text(segments))
        handler = handler_of(new)
        if isinstance(handler, Mapping):
            wide = bool(options_of(handler).get("allow_wide_fit"))
            moved = self._refit(handler, train, segments[self.train_key], wide)
            new["dataset"] = with_options(new["dataset"], handler=moved)
        if self.ds_extra_mod_func is not None:
            self.ds_extra_mod_func(new, self)
        return new

    # -- fit windows -----------------------------------------------------------------------------

    def _refit(self, config: Any, before: Any, train: Any, wide: bool) -> Any:
        """A configuration with every fit window in it moved from one train segment to another."""
        if isinstance(config, Mapping):
            return {
                key: self._refit_date(key, value, before, train, wide)
                if key in (FIT_START, FIT_END)
                else self._refit(value, before, train, wide)
                for key, value in config.items()
            }
        if isinstance(config, list | tuple):
            return [self._refit(each, before, train, wide) for each in config]
        return config

    def _refit_date(self, key: str, date: Any, before: Any, train: Any, wide: bool) -> Any:
        side, kind = (0, "start") if key == FIT_START else (1, "end")
        if date is None or before[side] is None or train[side] is None:
            return date
        row, old = self.ta.align_idx(date, kind), self.ta.align_idx(before[side], kind)
        new = self.ta.align_idx(train[side], kind)
        assert row is not None
        assert old is not None
        assert new is not None
        offset = row - old
        if not wide:  # inside the segment, whatever the task said of the whole
            offset = max(offset, 0) if key == FIT_START else min(offset, 0)
        return plain_value(self.ta.get(max(0, new + offset)))
