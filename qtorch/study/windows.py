"""The tasks of a rolling study: windows that share what they can."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from qtorch.core.errors import ConfigError
from qtorch.task.parts import (
    handler_of,
    options_of,
    segments_of,
    with_handler,
)
from qtorch.task.rolling import RollingGen
from qtorch.tracking.recorder import Recorder

log = logging.getLogger(__name__)

WARM_START = "qtorch.study.warm_start.WarmStart"


def rolled(
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
    """The windows of a task, on one span of features and with records of their own."""
    task = task if horizon is None else with_horizon(task, horizon)
    roll = RollingGen(
        step,
        rtype,
        trunc_days=trunc_days,
        task_copy_func=shared,
        overshoot=False,
        calendar=calendar,
    )
    tasks = [{**each, "record": list(records)} for each in roll.generate(task)]
    return with_one_span(tasks, cache)


def with_one_span(
    tasks: Sequence[Mapping[str, Any]], cache: bool | str = False
) -> list[dict[str, Any]]:
    """The tasks with one end for all handlers' data, so that they share features.

    A feature does not depend on where the data end; the rows behind a task's last segment are
    sampled by nobody. `cache` is the handlers' argument. Handlers that are no configuration stay.
    """
    ends = [options_of(handler_of(task)).get("end_time") for task in tasks]
    given = [end for end in ends if end is not None]
    last = max(given, key=pd.Timestamp) if len(given) == len(ends) and given else None
    made = []
    for task in tasks:
        options = options_of(handler_of(task))
        changes: dict[str, Any] = {"end_time": last} if "end_time" in options else {}
        if cache is not False:
            changes["cache"] = cache
        made.append(with_handler(task, **changes))
    return made


def with_horizon(task: Mapping[str, Any], horizon: int) -> dict[str, Any]:
    """The task with the return from tomorrow's close to that of `horizon` days later as label."""
    if int(horizon) < 1:
        raise ConfigError(f"horizon={horizon}: the label's return is over at least one day.")
    if not isinstance(handler_of(task), Mapping):
        raise ConfigError(
            "horizon=... sets the label of a handler's configuration, but this task's handler is "
            "none; set the label where the handler is made."
        )
    return with_handler(task, label=[f"Ref($close, -{int(horizon) + 1})/Ref($close, -1) - 1"])


def warmed(task: Mapping[str, Any], before: Recorder, options: Mapping[str, Any]) -> dict[str, Any]:
    """The task with a model that begins at an earlier run's weights."""
    model = {
        "_target_": WARM_START,
        "recorder_id": before.id,
        "experiment_id": before.experiment_id,
        **({"options": dict(options)} if options else {}),
    }
    return {**task, "model": model}


def shared(task: Any) -> Any:
    """A copy of a task's containers; live objects in it (a handler with its data) are shared."""
    if isinstance(task, Mapping):
        return {key: shared(value) for key, value in task.items()}
    if isinstance(task, list | tuple):
        return [shared(value) for value in task]
    return task


def span_text(tasks: Sequence[Mapping[str, Any]]) -> str:
    """The first and last test day of all windows."""
    spans = [segments_of(task)["test"] for task in tasks]
    return f"tested {spans[0][0]}..{spans[-1][1]}"
