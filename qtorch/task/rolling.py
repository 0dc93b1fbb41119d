"""RollingGen: tasks that are retrained every few bars and tested on the bars that follow."""

from __future__ import annotations

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from qtorch.core.dates import last_instant
from qtorch.core.errors import ConfigError, unknown_name_message
from qtorch.core.instantiate import init_instance_by_config, resolve_config
from qtorch.task.adjust import CalendarEndError, TimeAdjuster

FIT_START, FIT_END = "fit_start_time", "fit_end_time"


def config_arguments(config: Any) -> Mapping[str, Any]:
    """Return the arguments in a configuration; empty if it is not a configuration."""
    if not isinstance(config, Mapping):
        return {}
    options = config if "_target_" in config else config.get("kwargs") or {}
    return options if isinstance(options, Mapping) else {}


def with_arguments(config: Mapping[str, Any], **values: Any) -> dict[str, Any]:
    """Return a configuration with some arguments replaced or added."""
    if "_target_" in config:
        return {**config, **values}
    return {**config, "kwargs": {**(config.get("kwargs") or {}), **values}}


def task_dataset(task: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the configuration of a task's dataset; raise ConfigError if it is a live object."""
    dataset = task.get("dataset")
    if not isinstance(dataset, Mapping):
        raise ConfigError(
            f"generating tasks needs the configuration of a dataset, but this task's dataset is "
            f"{'missing' if dataset is None else f'a live {type(dataset).__name__}'}. Write "
            "{'_target_': 'qtorch.data.TSDatasetH', 'handler': ..., 'segments': ...}."
        )
    return dataset


def task_segments(task: Mapping[str, Any]) -> dict[str, Any]:
    """Return a task's segments, `{name: (start, end)}`."""
    segments = config_arguments(task_dataset(task)).get("segments")
    if not isinstance(segments, Mapping):
        raise ConfigError(
            f"the task's dataset has no valid segments ({segments!r:.60}); expected "
            "{name: (start, end)}."
        )
    return dict(segments)


def with_segments(task: Mapping[str, Any], segments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the task with other segments."""
    return {**task, "dataset": with_arguments(task_dataset(task), segments=dict(segments))}


def task_handler(task: Mapping[str, Any]) -> Any:
    """Return the handler of a task: a configuration, a path, a live object, or None."""
    return config_arguments(task_dataset(task)).get("handler")


def with_handler(task: Mapping[str, Any], **values: Any) -> dict[str, Any]:
    """Return the task with some handler arguments replaced, if the handler is a configuration."""
    handler = task_handler(task)
    if not isinstance(handler, Mapping):
        return dict(task)
    dataset = with_arguments(task_dataset(task), handler=with_arguments(handler, **values))
    return {**task, "dataset": dataset}


def task_source(task: Mapping[str, Any]) -> Any:
    """Return a task's data source, as configuration or live object; None if it names none."""
    handler = task_handler(task)
    if isinstance(handler, Mapping):
        arguments = config_arguments(handler)
        source = arguments.get("source")
        return (
            source
            if source is not None
            else config_arguments(arguments.get("data_loader")).get("source")
        )
    return handler.bars_source() if _is_handler(handler) else None


def _is_handler(handler: Any) -> bool:
    from qtorch.data.handler.handler import DataHandler

    return isinstance(handler, DataHandler)


def task_frequency(task: Mapping[str, Any]) -> str | None:
    """Return the frequency of a task's data; None if its configuration leaves it to the source."""
    handler = task_handler(task)
    if not isinstance(handler, Mapping):
        return handler.frequency() if _is_handler(handler) else None
    arguments = config_arguments(handler)
    freq = arguments.get("freq", config_arguments(arguments.get("data_loader")).get("freq"))
    return next(iter(freq.values()), None) if isinstance(freq, Mapping) else freq


def label_horizon(task: Mapping[str, Any]) -> int | None:
    """Return how many calendar rows the task's label looks ahead; None if that is unknown.

    It is the dataset's `horizon`, else the look-ahead of the label's expressions.
    """
    dataset_horizon = config_arguments(task_dataset(task)).get("horizon")
    if dataset_horizon is not None:
        return int(dataset_horizon)
    handler = task_handler(task)
    if isinstance(handler, Mapping):
        # If the configuration sets `init_data`, build the handler without loading its data.
        overrides = {"init_data": False} if "init_data" in config_arguments(handler) else {}
        handler = init_instance_by_config(with_arguments(handler, **overrides))
    horizon = getattr(handler, "horizon", None)
    label_rows: int | None = horizon("label") if callable(horizon) else None
    return label_rows


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
    tasks = resolve_config(tasks)
    generated_tasks = [dict(t) for t in ([tasks] if isinstance(tasks, Mapping) else tasks)]
    for generator in [generators] if isinstance(generators, TaskGen) else generators:
        generated_tasks = [new for task in generated_tasks for new in generator.generate(task)]
    return generated_tasks


class MultiHorizonGenBase(TaskGen):
    """Generates one task per label horizon; a subclass implements `set_horizon`.

    `label_leak_n` is the number of bars after the prediction until a label of horizon 0 would be
    known: 2 if shares are bought on the next bar and sold on the one after. Each task's other
    segments end `horizon + label_leak_n` bars before its test segment. `calendar` is that
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
            generated_tasks.append(with_segments(new, adjuster.to_text(segments)))
        return generated_tasks


def truncate_segments(
    adjuster: TimeAdjuster, segments: Mapping[str, Any], days: int, test_key: str = "test"
) -> dict[str, Any]:
    """Truncate all segments but the test's to end `days` bars before the test begins."""
    starts = [t for t in segments[test_key] if t is not None]
    test_start = min(starts, key=pd.Timestamp)
    return {
        name: span if name == test_key else adjuster.truncate(span, test_start, days)
        for name, span in segments.items()
    }


def build_adjuster(
    task: TaskDef, calendar: Sequence[Any] | pd.DatetimeIndex | None = None
) -> TimeAdjuster:
    """Build a TimeAdjuster on a calendar, by default on the bars of the task's source."""
    if calendar is not None:
        return TimeAdjuster(calendar=calendar)
    return TimeAdjuster(source=task_source(task), freq=task_frequency(task))


def copy_task(task: TaskDef) -> dict[str, Any]:
    """Return a deep copy of a task."""
    new: dict[str, Any] = copy.deepcopy(dict(resolve_config(task)))
    return new


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
    if test_end is None or last_instant(end) < last_instant(test_end):
        task.update(with_handler(task, end_time=test_end))


class RollingGen(TaskGen):
    """Generates tasks whose segments advance by `step` bars; each is tested on `step` bars.

    Bars are those of the task's frequency: trading days unless the data has another one.

    rtype: "expanding" keeps the start of the train segment, "sliding" its length; all other
        segments slide.
    overshoot: the first test segment starts with the task's test segment and the last one contains
        its end. The last one has the full length and may extend beyond that end (as in Qlib),
        unless `overshoot` is False.
    trunc_days: the other segments end that many bars before the test begins. None is the
        look-ahead of the task's label (Qlib truncates nothing then), 0 truncates nothing. Purging
        in the dataset does not remove the same bars again: it drops samples by the end of their
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
            raise ConfigError(
                unknown_name_message("rtype", str(rtype), (self.ROLL_EX, self.ROLL_SD))
            )
        if int(step) < 1:
            raise ConfigError(f"step={step}: step must be at least one bar.")
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
        task = resolve_config(task)
        self._adjuster = build_adjuster(task, self.calendar)
        own_segments = task_segments(task)
        for key in (self.test_key, self.train_key):
            if key not in own_segments:
                raise ConfigError(unknown_name_message("segment", key, own_segments))
        segments = self._align(own_segments)
        start, end = segments[self.test_key]
        if start is None:
            raise ConfigError("rolling needs a test segment with a start date.")
        end = self.ta.max() if end is None else pd.Timestamp(end)
        segments[self.test_key] = self._first_test_segment(start)
        days = label_horizon(task) if self.trunc_days is None else self.trunc_days
        if days is None:
            log.info(
                "the look-ahead of the label is unknown: no segment is truncated; set trunc_days"
            )
        elif days > 0:
            segments = truncate_segments(self.ta, segments, days, self.test_key)
        train = self._align(own_segments)[self.train_key]
        first = self._move_task(task, train, segments, end)
        return [first, *self.gen_following_tasks(first, end)]

    def gen_following_tasks(self, task: TaskDef, test_end: Any) -> Iterator[dict[str, Any]]:
        """Generate the windows after that of `task`, up to the one that contains `test_end`."""
        if self._adjuster is None:
            self._adjuster = build_adjuster(task, self.calendar)
        base = segments = self._align(task_segments(task))
        last = pd.Timestamp(test_end)
        if self.ta.is_intraday and isinstance(test_end, str):
            last = last_instant(test_end)
        while True:
            try:
                segments = self.ta.to_text(
                    {name: self._shift_segment(name, span) for name, span in segments.items()}
                )
            except CalendarEndError:
                return
            test_start = segments[self.test_key][0]
            assert test_start is not None, "shift raises at the calendar's end"
            if pd.Timestamp(test_start) > last:
                return
            yield self._move_task(task, base[self.train_key], segments, last)

    def _align(self, segments: Mapping[str, Any]) -> dict[str, Any]:
        """Align segments to the calendar; as text, which names one bar also as an end."""
        return self.ta.to_text(self.ta.align_seg(segments))

    def _first_test_segment(self, start: Any) -> tuple[Any, Any]:
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
        if not self.overshoot and (last is None or pd.Timestamp(last) > end):
            segments = {**segments, self.test_key: (start, end)}
        new["dataset"] = with_arguments(task_dataset(new), segments=self.ta.to_text(segments))
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
        if isinstance(date, str) and date.startswith("<"):
            return date  # a placeholder such as <dataset.kwargs.segments.train.0>
        row, old = self.ta.align_idx(date, kind), self.ta.align_idx(old_train[side], kind)
        new = self.ta.align_idx(new_train[side], kind)
        assert row is not None
        assert old is not None
        assert new is not None
        offset = row - old
        if not is_wide_allowed:  # keep the fit window inside the train segment
            offset = max(offset, 0) if key == FIT_START else min(offset, 0)
        return self.ta.to_text({key: [self.ta.get(max(0, new + offset))]})[key][0]
