"""Build the tasks of a rolling study, so that its windows share features."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from qtorch.core.errors import ConfigError
from qtorch.task.parts import (
    config_arguments,
    task_handler,
    task_segments,
    with_handler,
)
from qtorch.task.rolling import RollingGen
from qtorch.tracking.recorder import Recorder

log = logging.getLogger(__name__)

WARM_START = "qtorch.study.warm_start.WarmStart"


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
    """The tasks of all windows, with a common end of the data and with `records` as records."""
    task = task if horizon is None else with_horizon(task, horizon)
    generator = RollingGen(
        step,
        rtype,
        trunc_days=trunc_days,
        task_copy_func=copy_containers,
        overshoot=False,
        calendar=calendar,
    )
    tasks = [{**window, "record": list(records)} for window in generator.generate(task)]
    return with_common_end(tasks, cache)


def with_common_end(
    tasks: Sequence[Mapping[str, Any]], cache: bool | str = False
) -> list[dict[str, Any]]:
    """Give the handlers of all tasks the same end date, so that they share cached features.

    This is safe because a feature does not depend on where the data end, and no sample is taken
    from the rows after a task's last segment. `cache` is the argument of the handlers. Handlers
    that are objects instead of configurations are left as they are.
    """
    all_ends = [config_arguments(task_handler(task)).get("end_time") for task in tasks]
    ends = [end for end in all_ends if end is not None]
    last = max(ends, key=pd.Timestamp) if len(ends) == len(all_ends) and ends else None
    new_tasks = []
    for task in tasks:
        options = config_arguments(task_handler(task))
        changes: dict[str, Any] = {"end_time": last} if "end_time" in options else {}
        if cache is not False:
            changes["cache"] = cache
        new_tasks.append(with_handler(task, **changes))
    return new_tasks


def with_horizon(task: Mapping[str, Any], horizon: int) -> dict[str, Any]:
    """Set the label to the return from tomorrow's close to the close `horizon` days later."""
    if int(horizon) < 1:
        raise ConfigError(f"horizon={horizon}: expected at least 1 (the days of the return).")
    if not isinstance(task_handler(task), Mapping):
        raise ConfigError(
            "horizon=... sets the label in a handler's configuration, but this task's handler is "
            "an object; set the label when you create it."
        )
    return with_handler(task, label=[f"Ref($close, -{int(horizon) + 1})/Ref($close, -1) - 1"])


def with_warm_start(
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


def copy_containers(task: Any) -> Any:
    """Copy the containers of a task; objects in it (a handler with its data) are not copied."""
    if isinstance(task, Mapping):
        return {key: copy_containers(value) for key, value in task.items()}
    if isinstance(task, list | tuple):
        return [copy_containers(value) for value in task]
    return task


def span_text(tasks: Sequence[Mapping[str, Any]]) -> str:
    """Text with the first and last test day of all windows."""
    spans = [task_segments(task)["test"] for task in tasks]
    return f"tested on {spans[0][0]}..{spans[-1][1]}"
