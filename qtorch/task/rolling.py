"""RollingGen: tasks that are retrained every few days and tested on the following days."""

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
from qtorch.task.generate import (
    TaskDef,
    TaskGen,
    build_adjuster,
    segments_to_text,
    truncate_segments,
)
from qtorch.task.parts import (
    FIT_END,
    FIT_START,
    config_arguments,
    label_horizon,
    task_dataset,
    task_handler,
    task_segments,
    with_arguments,
    with_handler,
)

log = logging.getLogger(__name__)


def handler_mod(task: dict[str, Any], rolling_gen: RollingGen) -> None:
    """Extend the handler's data to the end of the test segment, if it ends earlier.

    A handler that is not a configuration (a path, a live object) is left unchanged.
    """
    arguments = config_arguments(task_handler(task))
    end = arguments.get("end_time")
    if end is None:
        return
    test_end = task_segments(task)[rolling_gen.test_key][1]
    if test_end is None or rolling_gen.ta.cal_interval(end, test_end) < 0:
        task.update(with_handler(task, end_time=test_end))


class RollingGen(TaskGen):
    """Generates tasks whose segments advance by `step` trading days; each is tested on `step` days.

    rtype: "expanding" keeps the start of the train segment, "sliding" its length; all other
        segments slide.
    overshoot: the first test segment starts with the task's test segment and the last one contains
        its end. The last one has the full length and may extend beyond that end (as in Qlib),
        unless `overshoot` is False.
    trunc_days: the other segments end that many trading days before the test begins. None is the
        look-ahead of the task's label (Qlib truncates nothing then), 0 truncates nothing. Purging
        in the dataset does not remove the same days again: it drops samples by the end of their
        label.
    ds_extra_mod_func: `ds_extra_mod_func(task, rolling_gen)` may modify each task; the default
        moves the handler's end.
    task_copy_func: copies the task. Everything outside the arguments of its dataset and handler is
        as this function returns it.
    calendar: as for TimeAdjuster; by default that of the task's source.

    Fit windows (`fit_start_time`, `fit_end_time` of the handler and its processors) keep their
    position in the train segment. Dates in the tasks are ISO text, so that the tasks are plain
    data. Corresponds to qlib/workflow/task/gen.py.
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
            raise ConfigError(f"step={step}: step must be at least one trading day.")
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
        """The TimeAdjuster of the last task passed to `generate`."""
        if self._adjuster is None:
            self._adjuster = TimeAdjuster(calendar=self.calendar)
        return self._adjuster

    def generate(self, task: TaskDef) -> list[dict[str, Any]]:
        """Generate the tasks of all windows; the first has the task's own train segment."""
        task = plain(task)
        self._adjuster = build_adjuster(task, self.calendar)
        own_segments = task_segments(task)
        for key in (self.test_key, self.train_key):
            if key not in own_segments:
                raise ConfigError(unknown_name("segment", key, own_segments))
        segments = self.ta.align_seg(own_segments)
        start, end = segments[self.test_key]
        if start is None:
            raise ConfigError("rolling needs a test segment with a start date.")
        end = self.ta.max() if end is None else end
        segments[self.test_key] = self._first_test_segment(start)
        days = label_horizon(task) if self.trunc_days is None else self.trunc_days
        if days is None:
            log.info(
                "the look-ahead of the label is unknown: no segment is truncated; set trunc_days"
            )
        elif days > 0:
            segments = truncate_segments(self.ta, segments, days, self.test_key)
        train = self.ta.align_seg(own_segments)[self.train_key]
        first = self._move_task(task, train, segments, end)
        return [first, *self.gen_following_tasks(first, end)]

    def gen_following_tasks(self, task: TaskDef, test_end: Any) -> Iterator[dict[str, Any]]:
        """Generate the windows after that of `task`, up to the one that contains `test_end`."""
        if self._adjuster is None:
            self._adjuster = build_adjuster(task, self.calendar)
        base = segments = self.ta.align_seg(task_segments(task))
        last = pd.Timestamp(test_end)
        while True:
            try:
                segments = {
                    name: self._shift_segment(name, span) for name, span in segments.items()
                }
            except CalendarEndError:
                return
            if segments[self.test_key][0] > last:
                return
            yield self._move_task(task, base[self.train_key], segments, last)

    def _first_test_segment(self, start: pd.Timestamp) -> tuple[Any, Any]:
        row = self.ta.align_idx(start)
        assert row is not None
        return self.ta.get(row), self.ta.get(row + self.step - 1)

    def _shift_segment(self, name: str, span: Any) -> Any:
        is_expanding = name == self.train_key and self.rtype == self.ROLL_EX
        return self.ta.shift(span, self.step, self.ROLL_EX if is_expanding else self.ROLL_SD)

    def _move_task(
        self, task: TaskDef, train: Any, segments: Mapping[str, Any], end: pd.Timestamp
    ) -> dict[str, Any]:
        """Return a copy of the task with other segments.

        `train` is the train segment that the task's fit windows refer to, `end` the last test day.
        """
        new = dict(self.task_copy_func(task))
        start, last = segments[self.test_key]
        if not self.overshoot and (last is None or last > end):
            segments = {**segments, self.test_key: (start, end)}
        new["dataset"] = with_arguments(task_dataset(new), segments=segments_to_text(segments))
        handler = task_handler(new)
        if isinstance(handler, Mapping):
            is_wide_fit_allowed = bool(config_arguments(handler).get("allow_wide_fit"))
            moved_handler = self._move_fit_windows(
                handler, train, segments[self.train_key], is_wide_fit_allowed
            )
            new["dataset"] = with_arguments(new["dataset"], handler=moved_handler)
        if self.ds_extra_mod_func is not None:
            self.ds_extra_mod_func(new, self)
        return new

    # -- fit windows -----------------------------------------------------------------------------

    def _move_fit_windows(
        self, config: Any, old_train: Any, new_train: Any, is_wide_allowed: bool
    ) -> Any:
        """Move all fit windows in a configuration from one train segment to another."""
        if isinstance(config, Mapping):
            return {
                key: self._move_fit_date(key, value, old_train, new_train, is_wide_allowed)
                if key in (FIT_START, FIT_END)
                else self._move_fit_windows(value, old_train, new_train, is_wide_allowed)
                for key, value in config.items()
            }
        if isinstance(config, list | tuple):
            return [
                self._move_fit_windows(each, old_train, new_train, is_wide_allowed)
                for each in config
            ]
        return config

    def _move_fit_date(
        self, key: str, date: Any, old_train: Any, new_train: Any, is_wide_allowed: bool
    ) -> Any:
        side, kind = (0, "start") if key == FIT_START else (1, "end")
        if date is None or old_train[side] is None or new_train[side] is None:
            return date
        row, old = self.ta.align_idx(date, kind), self.ta.align_idx(old_train[side], kind)
        new = self.ta.align_idx(new_train[side], kind)
        assert row is not None
        assert old is not None
        assert new is not None
        offset = row - old
        if not is_wide_allowed:  # keep the fit window inside the train segment
            offset = max(offset, 0) if key == FIT_START else min(offset, 0)
        return plain_value(self.ta.get(max(0, new + offset)))
