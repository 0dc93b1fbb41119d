"""Read and replace parts of a task's configuration: its dataset, segments, handler and source.

A configuration may have either form, `_target_` with arguments beside it or `class` with `kwargs`.
The functions return modified copies and never modify their arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtorch.core.errors import ConfigError
from qtorch.core.instantiate import init_instance_by_config

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
    return getattr(handler, "source", None)


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
