"""Rolling studies: train a task on moving windows and evaluate the scores as one signal."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from qtorch.core.errors import QtorchError
from qtorch.core.instantiate import flatten_dict
from qtorch.metrics.signal import calc_ic
from qtorch.record.signal_analysis import finite_metrics, ic_figures
from qtorch.study.ensemble import RollingEnsemble
from qtorch.study.stitched import TEST, make_stitched_records, window_records
from qtorch.study.windows import rolling_tasks, span_text, with_warm_start
from qtorch.task.parts import task_segments
from qtorch.tracking.lineage import PARENT_TAG
from qtorch.tracking.r import R
from qtorch.tracking.recorder import Recorder
from qtorch.trainer.base import Trainer
from qtorch.trainer.failure import get_error, record_failure
from qtorch.trainer.prepare import complete_task, loggable_task
from qtorch.trainer.recorded import TrainerR

log = logging.getLogger(__name__)

WINDOW_TAG, SPAN_TAG = "rolling.window", "rolling.test"
WINDOWS = "rolling"  # the artifact with the list of windows


class StudyError(QtorchError, RuntimeError):
    """Windows of a study failed; the message names them."""


@dataclass
class RollingResult:
    """The result of a study: its run, the runs of the windows in order, the stitched scores."""

    recorder: Recorder
    windows: list[Recorder]
    tasks: list[dict[str, Any]]
    prediction: pd.DataFrame
    window_metrics: list[dict[str, float]] = field(default_factory=list)


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
    part_records: Sequence[Any] = (),
    calendar: Sequence[Any] | None = None,
    experiment_name: str | None = None,
    recorder_name: str = "rolling",
) -> RollingResult:
    """Roll a task through its test segment and evaluate the stitched signal in a run of its own.

    `trainer` trains the windows (None: one after another, in this process), each in a run that is
    a child of the study's run. `step`, `rtype` and `trunc_days` are those of RollingGen; the last
    window ends with the test segment. `horizon` sets the label to the return from tomorrow's close
    to the close `horizon` days later. `warm_start`: each window starts from the weights of the one
    before it (a mapping holds options of `finetune`), so the windows are trained one by one.
    `cache`: where the handlers' features are cached for all windows
    (`qtorch.data.feature_cache`); all handlers get the same end date, so that the windows can
    share them.

    The windows store their scores and the outputs of `part_records` (given like a task's
    `record`); the task's own records run on the stitched signal. The study's run has the artifacts
    `pred.pkl`, `label.pkl`, `task` and `rolling` (the list of windows), and each window's IC as
    the metric `window.IC`. Raises StudyError if windows failed; their runs, and the study's run,
    store the reason.
    """
    base = complete_task(task)
    tasks = rolling_tasks(
        base,
        step=step,
        rtype=rtype,
        horizon=horizon,
        trunc_days=trunc_days,
        cache=cache,
        calendar=calendar,
        records=window_records(part_records),
    )
    trainer = trainer or TrainerR(experiment_name)
    name = experiment_name or getattr(trainer, "experiment_name", None)
    options = {"step": step, "rtype": rtype, "horizon": horizon, "warm_start": warm_start}
    with R.start(experiment_name=name, recorder_name=recorder_name):
        parent = R.get_recorder()
        try:
            _log_study(parent, base, tasks, options)
            train = _train_windows if warm_start is False else _train_windows_in_sequence
            windows = train(trainer, tasks, parent, warm_start)
            _save_window_list(parent, tasks, windows)
            return _stitch_windows(base, parent, tasks, windows)
        except Exception as error:
            record_failure(parent, error)
            raise


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
    log.info("%d windows of %d days, %s", len(tasks), options["step"], span_text(tasks))


# -- training --------------------------------------------------------------------------------------


def _train_windows(
    trainer: Trainer, tasks: Sequence[dict[str, Any]], parent: Recorder, warm_start: Any
) -> list[Recorder]:
    """Train all windows; each run becomes a child of the study once the trainer returns it."""
    recorders = trainer.train(list(tasks))
    for number, recorder in enumerate(recorders):
        _tag_window(recorder, parent, number, tasks[number])
    windows: list[Recorder] = [
        R.get_recorder(recorder_id=r.id) for r in trainer.end_train(recorders)
    ]
    _check_statuses(windows, tasks)
    return windows


def _train_windows_in_sequence(
    trainer: Trainer,
    tasks: Sequence[dict[str, Any]],
    parent: Recorder,
    warm_start: Any,
) -> list[Recorder]:
    """Train the windows one by one, each from the weights of the one before it."""
    options = warm_start if isinstance(warm_start, Mapping) else {}
    windows: list[Recorder] = []
    for number, task in enumerate(tasks):
        task = with_warm_start(task, windows[-1], options) if windows else task
        recorders = trainer.train([task])
        _tag_window(recorders[0], parent, number, task)
        window = R.get_recorder(recorder_id=trainer.end_train(recorders)[0].id)
        _check_statuses([window], [task], first=number)
        windows.append(window)
    return windows


def _tag_window(recorder: Recorder, parent: Recorder, number: int, task: Mapping[str, Any]) -> None:
    start, end = task_segments(task)[TEST]
    tags = {PARENT_TAG: parent.id, WINDOW_TAG: number, SPAN_TAG: f"{start}..{end}"}
    recorder.set_tags(**tags)


def _check_statuses(
    windows: Sequence[Recorder], tasks: Sequence[Mapping[str, Any]], first: int = 0
) -> None:
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
    window_list: list[Any] = [
        {
            "window": number,
            "recorder_id": recorder.id,
            "experiment_id": recorder.experiment_id,
            "segments": task_segments(task),
        }
        for number, (task, recorder) in enumerate(zip(tasks, windows, strict=True))
    ]
    artifacts: dict[str, Any] = {WINDOWS: window_list}
    parent.save_objects(**artifacts)


def _stitch_windows(
    base: Mapping[str, Any],
    parent: Recorder,
    tasks: list[dict[str, Any]],
    windows: list[Recorder],
) -> RollingResult:
    parts = {number: recorder.load_object("pred.pkl") for number, recorder in enumerate(windows)}
    labels = {number: recorder.load_object("label.pkl") for number, recorder in enumerate(windows)}
    prediction, label = RollingEnsemble()(parts), RollingEnsemble()(labels)
    num_duplicates = sum(map(len, parts.values())) - len(prediction)
    if num_duplicates:
        raise StudyError(
            f"{num_duplicates} scores belong to two windows: their test segments overlap."
        )
    make_stitched_records(base, tasks, prediction, label, parent)
    window_metrics = []
    for number, part in parts.items():
        metrics = finite_metrics(
            ic_figures(*calc_ic(part.iloc[:, 0], label.iloc[:, 0].reindex(part.index)))
        )
        parent.log_batch({f"window.{name}": value for name, value in metrics.items()}, step=number)
        window_metrics.append(metrics)
    return RollingResult(parent, windows, tasks, prediction, window_metrics)
