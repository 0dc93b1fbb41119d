"""Rolling studies: train a task on moving windows and evaluate the scores as one signal."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from qtorch.core.dates import as_stamp, last_instant
from qtorch.core.errors import ConfigError, QtorchError, unknown_name_message
from qtorch.core.instantiate import flatten_dict, init_instance_by_config
from qtorch.core.plain import resolve_config
from qtorch.core.qlib.translation import translate_task
from qtorch.core.session import session
from qtorch.metrics.signal import calc_ic
from qtorch.model.base import BaseModel
from qtorch.record.signal import SignalRecord, finite_metrics, ic_figures
from qtorch.study.collect import RollingEnsemble
from qtorch.study.rolling_resume import (
    SPAN_TAG,
    STUDY_TAG,
    TEST,
    WINDOW_TAG,
    find_interrupted_study,
    identify_study,
    keeps_windows,
    window_options,
)
from qtorch.task.rolling import (
    RollingGen,
    config_arguments,
    task_dataset,
    task_handler,
    task_segments,
    with_arguments,
    with_handler,
)
from qtorch.tracking.manager import R
from qtorch.tracking.recorder import PARENT_TAG, Recorder
from qtorch.trainer.checks import check_task, record_class, record_list
from qtorch.trainer.failure import get_error
from qtorch.trainer.run import (
    complete_task,
    loggable_task,
    make_records,
    open_run,
)
from qtorch.trainer.trainers import Trainer, TrainerR

log = logging.getLogger(__name__)

WARM_START = "qtorch.study.warm_start.WarmStart"
SIGNAL_RECORD = "SignalRecord"


class StudyError(QtorchError, RuntimeError):
    """Windows of a study failed; the message names them."""


@dataclass
class RollingResult:
    """The result of a study.

    `recorder` is the study's own run; `windows`, `tasks` and `window_metrics` have one item per
    window, in order; `prediction` is the stitched signal.
    """

    recorder: Recorder
    windows: list[Recorder]
    tasks: list[dict[str, Any]]
    prediction: pd.DataFrame
    window_metrics: list[dict[str, float]]


def rolling_study(
    task: Mapping[str, Any],
    trainer: Trainer | None = None,
    *,
    step: int = 40,
    rtype: str = "expanding",
    horizon: int | None = None,
    trunc_days: int | None = None,
    warm_start: bool | Mapping[str, Any] = False,
    cache: bool | str = True,
    window_records: Sequence[Any] = (),
    calendar: Sequence[Any] | None = None,
    experiment_name: str | None = None,
    recorder_name: str = "rolling",
    resume: bool = True,
) -> RollingResult:
    """Roll a task through its test segment and evaluate the stitched signal in a run of its own.

    `trainer` trains the windows (None: one after another, in this process), each in a run that is
    a child of the study's run. `step`, `rtype` and `trunc_days` are those of RollingGen; the last
    window ends with the test segment. `horizon` sets the label to the return from tomorrow's close
    to the close `horizon` days later. `warm_start`: each window starts from the weights of the one
    before it (a mapping holds options of `finetune`), so the windows are trained one by one.
    `cache`: where the handlers' features are cached for all windows
    (`data.handler.feature_cache`); all handlers get the same end date, so that the windows can
    share them.

    The windows store their scores and the outputs of `window_records` (given like a task's
    `record`); the task's own records run on the stitched signal. The study's run has the artifacts
    `pred.pkl`, `label.pkl`, `task` and `rolling` (the list of windows), and each window's IC as
    the metric `window.IC`. Raises StudyError if windows failed; their runs, and the study's run,
    store the reason.

    `resume`: an equal study of the experiment that did not finish (its process was stopped or
    killed, or a window failed) goes on in its run. Its finished windows are used if data and code
    are unchanged, the others resume from their checkpoints. This needs a task pool, or TrainerR or
    FleetTrainer with their own training function, and a task without live objects; otherwise, and
    after a study that finished, a new study starts.
    """
    task = translate_task(resolve_config(task))
    if horizon is not None:
        _with_horizon(task, horizon)  # a wrong one is said before anything else
    # The stitched signal stands for the scores of a SignalRecord.
    check_task({**task, "record": _add_signal_record(task.get("record"))}, check_device=False)
    user_seed = session().seed if task.get("seed") is None else task["seed"]
    base = complete_task(task)
    tasks = rolling_tasks(
        base,
        step=step,
        rtype=rtype,
        horizon=horizon,
        trunc_days=trunc_days,
        cache=cache,
        calendar=calendar,
        records=_add_signal_record(window_records),
    )
    trainer = trainer or TrainerR(experiment_name)
    name = experiment_name or getattr(trainer, "experiment_name", None)
    options = {"step": step, "rtype": rtype, "horizon": horizon, "warm_start": warm_start}
    study_id = identify_study(base, tasks, options, user_seed) if keeps_windows(trainer) else None
    earlier_run = find_interrupted_study(study_id, name) if resume and study_id else None
    if earlier_run is not None:  # its windows have its seed
        seed = int(earlier_run.list_params()["seed"])
        base, tasks = {**base, "seed": seed}, [{**task, "seed": seed} for task in tasks]
    with open_run(earlier_run, name, recorder_name) as parent:
        _log_study(parent, base, tasks, options)
        train_options: dict[str, Any] = {}
        if study_id is not None:
            parent.set_tags(**{STUDY_TAG: study_id})
            train_options = window_options(trainer, str(parent.id), tasks)
        windows = _train_windows(trainer, tasks, parent, warm_start, train_options)
        _save_window_list(parent, tasks, windows)
        return _stitch_windows(base, parent, tasks, windows)


def _log_study(
    parent: Recorder,
    base: Mapping[str, Any],
    tasks: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
) -> None:
    """Log the study's task and options to its run."""
    rolling = {**options, "windows": len(tasks)}
    parent.log_params(**flatten_dict({**loggable_task(base), "rolling": rolling}))
    parent.save_objects(task=base)
    first, last = task_segments(tasks[0])[TEST], task_segments(tasks[-1])[TEST]
    message = "%d windows of %d days, tested on %s..%s"
    log.info(message, len(tasks), options["step"], first[0], last[1])


# -- training --------------------------------------------------------------------------------------


def _train_windows(
    trainer: Trainer,
    tasks: Sequence[dict[str, Any]],
    parent: Recorder,
    warm_start: bool | Mapping[str, Any],
    train_options: Mapping[str, Any],
) -> list[Recorder]:
    """Train all windows at once; or, with a warm start, each from the weights of the one before.

    Each run becomes a child of the study once the trainer returns it.
    """
    is_warm = warm_start is not False
    options = warm_start if isinstance(warm_start, Mapping) else {}
    windows: list[Recorder] = []
    batches = [[task] for task in tasks] if is_warm else [list(tasks)]
    for batch in batches:
        if is_warm and windows:
            batch = [_with_warm_start(batch[0], windows[-1], options)]
        first = len(windows)
        recorders = trainer.train(batch, **train_options)
        for number, (recorder, task) in enumerate(zip(recorders, batch, strict=True), first):
            _tag_window(recorder, parent, number, task)
        # Load the runs again: another process may have trained them and set their status.
        windows += [R.get_recorder(recorder_id=r.id) for r in trainer.end_train(recorders)]
        _check_statuses(windows[first:], batch, first)
    return windows


def _tag_window(recorder: Recorder, parent: Recorder, number: int, task: Mapping[str, Any]) -> None:
    """Make a window's run a child of the study's run, with its number and test span."""
    start, end = task_segments(task)[TEST]
    tags = {PARENT_TAG: parent.id, WINDOW_TAG: number, SPAN_TAG: f"{start}..{end}"}
    recorder.set_tags(**tags)
    span = f"{str(start)[:10]}..{str(end)[:10]}"
    if span not in str(recorder.name):
        recorder.rename(f"{recorder.name} {span}")


def _check_statuses(
    windows: Sequence[Recorder], tasks: Sequence[Mapping[str, Any]], first: int
) -> None:
    """Raise StudyError if a window did not finish; `first` is the number of the first one."""
    failed_windows = [
        f"window {first + k} (test {'..'.join(map(str, task_segments(tasks[k])[TEST]))}), run "
        f"{recorder.id}, is {recorder.status}: {get_error(recorder) or 'no error stored'}"
        for k, recorder in enumerate(windows)
        if recorder.status != Recorder.STATUS_FI
    ]
    if failed_windows:
        raise StudyError(
            f"{len(failed_windows)} of {len(windows)} windows did not finish, so the signal would "
            f"have gaps: {'; '.join(failed_windows)}."
        )


# -- the stitched signal ---------------------------------------------------------------------------


def _save_window_list(
    parent: Recorder, tasks: Sequence[Mapping[str, Any]], windows: Sequence[Recorder]
) -> None:
    """Save the list of windows as the artifact `rolling`."""
    window_list = [
        {
            "window": number,
            "recorder_id": recorder.id,
            "experiment_id": recorder.experiment_id,
            "segments": task_segments(task),
        }
        for number, (task, recorder) in enumerate(zip(tasks, windows, strict=True))
    ]
    parent.save_objects(rolling=window_list)


def _stitch_windows(
    base: Mapping[str, Any],
    parent: Recorder,
    tasks: list[dict[str, Any]],
    windows: list[Recorder],
) -> RollingResult:
    """Join the windows' scores and labels, and generate the task's records for them."""
    parts = {number: recorder.load_object("pred.pkl") for number, recorder in enumerate(windows)}
    labels = {number: recorder.load_object("label.pkl") for number, recorder in enumerate(windows)}
    prediction, label = RollingEnsemble()(parts), RollingEnsemble()(labels)
    num_duplicates = sum(map(len, parts.values())) - len(prediction)
    if num_duplicates:
        raise StudyError(
            f"{num_duplicates} scores belong to two windows: their test segments overlap."
        )
    _warn_about_missing_days(prediction, label)
    # The task's records see the stitched signal as the prediction of one model on one dataset.
    model, dataset = StitchedSignal(prediction), StitchedDataset(tasks, label)
    make_records(parent, _add_signal_record(base.get("record")), model, dataset)
    window_metrics = []
    for number, part in parts.items():
        metrics = finite_metrics(
            ic_figures(*calc_ic(part.iloc[:, 0], label.iloc[:, 0].reindex(part.index)))
        )
        parent.log_batch({f"window.{name}": value for name, value in metrics.items()}, step=number)
        window_metrics.append(metrics)
    return RollingResult(parent, windows, tasks, prediction, window_metrics)


class StitchedSignal(BaseModel):
    """A model whose scores are already known, so that records can use it like any other."""

    def __init__(self, scores: pd.DataFrame) -> None:
        self.scores = scores

    def predict(self, dataset: Any, segment: str | slice = TEST) -> pd.DataFrame:
        """Return the scores of a segment of the dataset, or of a slice of dates (inclusive)."""
        return _select_dates(self.scores, dataset.segments, segment)


class StitchedDataset:
    """A dataset of the windows' test segments as one segment, with the windows' stored raw label.

    "test" is its only segment. The raw label needs no data; for anything else, the windows' real
    dataset is built over the span of all windows.
    """

    def __init__(self, tasks: Sequence[Mapping[str, Any]], label: pd.DataFrame) -> None:
        first, last = task_segments(tasks[0])[TEST], task_segments(tasks[-1])[TEST]
        self.segments = {TEST: (first[0], last[1])}
        self._config = with_arguments(task_dataset(tasks[-1]), segments=self.segments)
        self._label = label

    @cached_property
    def full_dataset(self) -> Any:
        """The real dataset, built on first use; its processors are not fitted.

        A backtest takes the source of its bars from here (`PortAnaRecord`).
        """
        return init_instance_by_config(self._config)

    def prepare(
        self, segments: Any, col_set: Any = "__all", data_key: str = "infer", **options: Any
    ) -> Any:
        """Prepare data as the real dataset does; the raw label needs no dataset."""
        is_one_span = isinstance(segments, str | slice)
        if (col_set, data_key) == ("label", "raw") and is_one_span and not options:
            return _select_dates(self._label, self.segments, segments)
        return self.full_dataset.prepare(segments, col_set, data_key, **options)


def _add_signal_record(records: Any) -> list[Any]:
    """Return the list of a task's records; without a SignalRecord in it, put one first."""
    items = record_list(records)
    classes = [record_class(record) for record in items]
    if any(isinstance(c, type) and issubclass(c, SignalRecord) for c in classes):
        return items
    return [SIGNAL_RECORD, *items]


def _select_dates(frame: pd.DataFrame, segments: Mapping[str, Any], segment: Any) -> pd.DataFrame:
    """Return the rows of a segment, or of a slice of dates (inclusive)."""
    if isinstance(segment, str) and segment not in segments:
        raise ConfigError(unknown_name_message("segment of the stitched signal", segment, segments))
    span = slice(*segments[segment]) if isinstance(segment, str) else segment
    days = frame.index.get_level_values("datetime")
    mask = np.ones(len(frame), dtype=bool)
    if span.start is not None:
        mask &= days >= as_stamp(span.start)
    if span.stop is not None:
        mask &= days <= last_instant(span.stop)
    return frame[mask]


def _warn_about_missing_days(prediction: pd.DataFrame, label: pd.DataFrame) -> None:
    """Warn about days of the test span that have rows but no score."""
    days, scored_days = (f.index.get_level_values("datetime").unique() for f in (label, prediction))
    missing = days.difference(scored_days)
    if len(missing):
        log.warning(
            "%d of %d trading days have no score (the first is %s): none of their rows is a sample",
            len(missing),
            len(days),
            f"{missing[0]:%Y-%m-%d}",
        )


# -- the tasks of the windows ----------------------------------------------------------------------


def rolling_tasks(
    task: Mapping[str, Any],
    *,
    step: int,
    rtype: str,
    horizon: int | None,
    trunc_days: int | None,
    cache: bool | str,
    calendar: Sequence[Any] | None,
    records: Sequence[Any],
) -> list[dict[str, Any]]:
    """Return the tasks of all windows, which share their features and have `records` as records.

    The other arguments are those of `rolling_study`.
    """
    task = task if horizon is None else _with_horizon(task, horizon)
    generator = RollingGen(
        step,
        rtype,
        trunc_days=trunc_days,
        task_copy_func=_copy_containers,  # a handler with its data is too large to copy
        overshoot=False,  # no window is tested beyond the task's own test segment
        calendar=calendar,
    )
    tasks = [{**window, "record": list(records)} for window in generator.generate(task)]
    return _with_shared_features(tasks, cache)


def _with_shared_features(
    tasks: Sequence[Mapping[str, Any]], cache: bool | str
) -> list[dict[str, Any]]:
    """Give the handlers of all tasks the same end date and cache, so that they share features.

    The later end is safe: a feature does not depend on where the data end, and no sample is taken
    from the rows after a task's last segment. `cache` is the argument of the handlers (False leaves
    theirs unchanged). Handlers that are objects instead of configurations are left as they are.
    """
    all_ends = [config_arguments(task_handler(task)).get("end_time") for task in tasks]
    ends = [end for end in all_ends if end is not None]
    # An end of None means the end of the data, so that it is later than any date.
    last = max(ends, key=last_instant) if len(ends) == len(all_ends) and ends else None
    new_tasks = []
    for task in tasks:
        options = config_arguments(task_handler(task))
        changes: dict[str, Any] = {"end_time": last} if "end_time" in options else {}
        if cache is not False:
            changes["cache"] = cache
        new_tasks.append(with_handler(task, **changes))
    return new_tasks


def _with_horizon(task: Mapping[str, Any], horizon: int) -> dict[str, Any]:
    """Set the label to the return from tomorrow's close to the close `horizon` days later."""
    if int(horizon) < 1:
        raise ConfigError(f"horizon={horizon}: expected at least 1 (the days of the return).")
    if not isinstance(task_handler(task), Mapping):
        raise ConfigError(
            "horizon=... sets the label in a handler's configuration, but this task's handler is "
            "an object; set the label when you create it."
        )
    return with_handler(task, label=[f"Ref($close, -{int(horizon) + 1})/Ref($close, -1) - 1"])


def _with_warm_start(
    task: Mapping[str, Any], previous: Recorder, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Replace the task's model by one that starts from the weights of an earlier run."""
    model = {
        "_target_": WARM_START,
        "recorder_id": previous.id,
        "experiment_id": previous.experiment_id,
        **({"options": dict(options)} if options else {}),
    }
    return {**task, "model": model}


def _copy_containers(task: Any) -> Any:
    """Copy the containers of a task; objects in it (a handler with its data) are not copied."""
    if isinstance(task, Mapping):
        return {key: _copy_containers(value) for key, value in task.items()}
    if isinstance(task, list | tuple):
        return [_copy_containers(value) for value in task]
    return task
