"""A rolling study: one task through time, its windows' scores as one signal, judged as one."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from qtorch.core.errors import QtorchError
from qtorch.core.instantiate import flatten_dict
from qtorch.metrics.signal import calc_ic
from qtorch.record.signal_analysis import finite, ic_figures
from qtorch.study.ensemble import RollingEnsemble
from qtorch.study.stitched import TEST, make_stitched_records, window_records
from qtorch.study.windows import rolled, span_text, warmed
from qtorch.task.parts import segments_of
from qtorch.tracking.lineage import PARENT_TAG
from qtorch.tracking.r import R
from qtorch.tracking.recorder import Recorder
from qtorch.trainer.base import Trainer
from qtorch.trainer.failure import error_of, record_failure
from qtorch.trainer.prepare import complete_task, shown_task
from qtorch.trainer.recorded import TrainerR

log = logging.getLogger(__name__)

WINDOW_TAG, SPAN_TAG = "rolling.window", "rolling.test"
WINDOWS = "rolling"  # the artifact that lists them


class StudyError(QtorchError, RuntimeError):
    """Windows of a study failed; the message names them."""


@dataclass
class RollingResult:
    """What a study leaves: its run, the windows' runs in order, the stitched scores."""

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
    """Roll a task through its test segment and judge the stitched signal in a run of its own.

    The windows are trained by `trainer` (None: one after another, here), each in its run, which
    is a child of the study's. `step`, `rtype` and `trunc_days` are RollingGen's; the last window
    ends with the test segment. `horizon` sets the label to the return from tomorrow's close to
    the one `horizon` days later. `warm_start`: each window begins from the one before it (as
    options of `finetune`, if a mapping), so that they are trained one by one. `cache`: where
    the handler's features are kept for all windows (`qtorch.data.feature_cache`); their handlers
    are given one span of dates, so that the windows share them.

    The windows store their scores, and what `part_records` (like a task's `record`) make; the
    task's own records run on the stitched signal. The study's run holds `pred.pkl`, `label.pkl`,
    `task`, the list of windows as `rolling`, and each window's IC as the metric `window.IC`.
    Raises StudyError where windows failed: their runs, and the study's, say why.
    """
    base = complete_task(task)
    tasks = rolled(
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
    told = {"step": step, "rtype": rtype, "horizon": horizon, "warm_start": warm_start}
    with R.start(experiment_name=name, recorder_name=recorder_name):
        parent = R.get_recorder()
        try:
            _begin(parent, base, tasks, told)
            train = _trained if warm_start is False else _trained_in_turn
            windows = train(trainer, tasks, parent, warm_start)
            _keep_windows(parent, tasks, windows)
            return _stitched(base, parent, tasks, windows)
        except Exception as error:
            record_failure(parent, error)
            raise


def _begin(
    parent: Recorder,
    base: Mapping[str, Any],
    tasks: Sequence[Mapping[str, Any]],
    told: Mapping[str, Any],
) -> None:
    """What the study is, into its run."""
    rolling = {**told, "windows": len(tasks)}
    parent.log_params(**flatten_dict({**shown_task(base), "rolling": rolling}))
    parent.save_objects(task=base)
    log.info("%d windows of %d days, %s", len(tasks), told["step"], span_text(tasks))


# -- training --------------------------------------------------------------------------------------


def _trained(
    trainer: Trainer, tasks: Sequence[dict[str, Any]], parent: Recorder, warm_start: Any
) -> list[Recorder]:
    """The windows' runs; each is the study's child as soon as the trainer tells of it."""
    begun = trainer.train(list(tasks))
    for number, recorder in enumerate(begun):
        _adopt(recorder, parent, number, tasks[number])
    ended: list[Recorder] = [R.get_recorder(recorder_id=r.id) for r in trainer.end_train(begun)]
    _check(ended, tasks)
    return ended


def _trained_in_turn(
    trainer: Trainer,
    tasks: Sequence[dict[str, Any]],
    parent: Recorder,
    warm_start: Any,
) -> list[Recorder]:
    """The same where each window needs the one before it."""
    options = warm_start if isinstance(warm_start, Mapping) else {}
    done: list[Recorder] = []
    for number, task in enumerate(tasks):
        task = warmed(task, done[-1], options) if done else task
        begun = trainer.train([task])
        _adopt(begun[0], parent, number, task)
        ended = R.get_recorder(recorder_id=trainer.end_train(begun)[0].id)
        _check([ended], [task], first=number)
        done.append(ended)
    return done


def _adopt(recorder: Recorder, parent: Recorder, number: int, task: Mapping[str, Any]) -> None:
    start, end = segments_of(task)[TEST]
    tags = {PARENT_TAG: parent.id, WINDOW_TAG: number, SPAN_TAG: f"{start}..{end}"}
    recorder.set_tags(**tags)


def _check(windows: Sequence[Recorder], tasks: Sequence[Mapping[str, Any]], first: int = 0) -> None:
    failed = [
        f"window {first + k} (test {'..'.join(map(str, segments_of(tasks[k])[TEST]))}), run "
        f"{recorder.id}, is {recorder.status}: {error_of(recorder) or 'no error stored'}"
        for k, recorder in enumerate(windows)
        if recorder.status != Recorder.STATUS_FI
    ]
    if failed:
        raise StudyError(
            f"{len(failed)} of {len(windows)} windows did not finish, so the signal would have "
            f"holes: {'; '.join(failed)}."
        )


# -- the stitched signal ---------------------------------------------------------------------------


def _keep_windows(
    parent: Recorder, tasks: Sequence[Mapping[str, Any]], windows: Sequence[Recorder]
) -> None:
    listed: list[Any] = [
        {
            "window": number,
            "recorder_id": recorder.id,
            "experiment_id": recorder.experiment_id,
            "segments": segments_of(task),
        }
        for number, (task, recorder) in enumerate(zip(tasks, windows, strict=True))
    ]
    named: dict[str, Any] = {WINDOWS: listed}
    parent.save_objects(**named)


def _stitched(
    base: Mapping[str, Any],
    parent: Recorder,
    tasks: list[dict[str, Any]],
    windows: list[Recorder],
) -> RollingResult:
    parts = {number: recorder.load_object("pred.pkl") for number, recorder in enumerate(windows)}
    labels = {number: recorder.load_object("label.pkl") for number, recorder in enumerate(windows)}
    prediction, label = RollingEnsemble()(parts), RollingEnsemble()(labels)
    doubled = sum(map(len, parts.values())) - len(prediction)
    if doubled:
        raise StudyError(f"{doubled} scores belong to two windows: their test segments overlap.")
    make_stitched_records(base, tasks, prediction, label, parent)
    figures = []
    for number, part in parts.items():
        own = finite(ic_figures(*calc_ic(part.iloc[:, 0], label.iloc[:, 0].reindex(part.index))))
        parent.log_batch({f"window.{name}": value for name, value in own.items()}, step=number)
        figures.append(own)
    return RollingResult(parent, windows, tasks, prediction, figures)
