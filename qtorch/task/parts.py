"""The parts of a task that make it a series: its segments, its handler, its data's calendar.

A configuration stands in either form, `_target_` with arguments beside it or `class` with
`kwargs`; nothing here changes what it is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtorch.core.errors import ConfigError
from qtorch.core.instantiate import init_instance_by_config

FIT_START, FIT_END = "fit_start_time", "fit_end_time"


def options_of(config: Any) -> Mapping[str, Any]:
    """The arguments in a configuration; none for what is no configuration."""
    if not isinstance(config, Mapping):
        return {}
    options = config if "_target_" in config else config.get("kwargs") or {}
    return options if isinstance(options, Mapping) else {}


def with_options(config: Mapping[str, Any], **values: Any) -> dict[str, Any]:
    """A configuration with some arguments replaced or added."""
    if "_target_" in config:
        return {**config, **values}
    return {**config, "kwargs": {**(config.get("kwargs") or {}), **values}}


def dataset_of(task: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration of a task's dataset; ConfigError where it is none."""
    dataset = task.get("dataset")
    if not isinstance(dataset, Mapping):
        raise ConfigError(
            f"a series of tasks is made from a dataset's configuration; this task's dataset is "
            f"{'missing' if dataset is None else f'a live {type(dataset).__name__}'}. Give "
            "{'_target_': 'qtorch.data.TSDatasetH', 'handler': ..., 'segments': ...}."
        )
    return dataset


def segments_of(task: Mapping[str, Any]) -> dict[str, Any]:
    """A task's segments, `{name: (start, end)}`."""
    segments = options_of(dataset_of(task)).get("segments")
    if not isinstance(segments, Mapping):
        raise ConfigError(
            f"the task's dataset has no segments ({segments!r:.60}); expected "
            "{name: (start, end)}."
        )
    return dict(segments)


def with_segments(task: Mapping[str, Any], segments: Mapping[str, Any]) -> dict[str, Any]:
    """The task with other segments."""
    return {**task, "dataset": with_options(dataset_of(task), segments=dict(segments))}


def handler_of(task: Mapping[str, Any]) -> Any:
    """What the task says of its handler: a configuration, a path, a live object, or None."""
    return options_of(dataset_of(task)).get("handler")


def with_handler(task: Mapping[str, Any], **values: Any) -> dict[str, Any]:
    """The task with some of its handler's arguments replaced; as it is without a configuration."""
    handler = handler_of(task)
    if not isinstance(handler, Mapping):
        return dict(task)
    dataset = with_options(dataset_of(task), handler=with_options(handler, **values))
    return {**task, "dataset": dataset}


def source_of(task: Mapping[str, Any]) -> Any:
    """The source of bars that a task names, configured or live; None where it names none."""
    handler = handler_of(task)
    if isinstance(handler, Mapping):
        given = options_of(handler)
        found = given.get("source")
        return found if found is not None else options_of(given.get("data_loader")).get("source")
    return getattr(handler, "source", None)


def label_horizon(task: Mapping[str, Any]) -> int | None:
    """Calendar rows that the task's label looks ahead; None where nothing says it.

    The dataset's own `horizon` counts, else the reach of the label's expressions.
    """
    given = options_of(dataset_of(task)).get("horizon")
    if given is not None:
        return int(given)
    handler = handler_of(task)
    if isinstance(handler, Mapping):
        quiet = {"init_data": False} if "init_data" in options_of(handler) else {}
        handler = init_instance_by_config(with_options(handler, **quiet))
    horizon = getattr(handler, "horizon", None)
    found: int | None = horizon("label") if callable(horizon) else None
    return found
