"""Complete a task before it is stored, so that a worker elsewhere needs no `qtorch.init`."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from typing import Any

from qtorch.core.configured import Configured
from qtorch.core.errors import ConfigError, unknown_name
from qtorch.core.instantiate import plain
from qtorch.core.session import session

REQUIRED_KEYS = ("model", "dataset")
TRACKING_KEY, TRACKING_FIELDS = "tracking", ("experiment_name", "recorder_name", "uri")
QLIB_SOURCE = "qtorch.data.source.qlib.QlibSource"
PATH_ARGUMENTS = {"provider_uri", "path"}  # arguments of data sources that are paths on disk


def split_tracking(task: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
    """Split a task into the task without `tracking`, and `tracking`: where its run is stored.

    `tracking` is `{"experiment_name", "recorder_name", "uri"}`, each optional. A trainer with a
    task pool writes it, so that a worker in another folder stores the run in the trainer's
    experiment. It does not influence the training, so the run's params and its artifact `task` do
    not contain it.
    """
    if not isinstance(task, Mapping) or TRACKING_KEY not in task:
        return task, {}
    tracking = task[TRACKING_KEY] or {}
    unknown_keys = (
        [k for k in tracking if k not in TRACKING_FIELDS]
        if isinstance(tracking, Mapping)
        else [TRACKING_KEY]
    )
    if unknown_keys:
        raise ConfigError(
            unknown_name(f"key of a task's {TRACKING_KEY!r}", str(unknown_keys[0]), TRACKING_FIELDS)
        )
    return {k: v for k, v in task.items() if k != TRACKING_KEY}, tracking


def complete_task(task: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a task and write the defaults of this process into it.

    Seed: the task's, else the session's, else a random one (so that the run can be repeated).
    Data source: a handler configured without one gets the session's `provider_uri`. Raises
    ConfigError for a task without model or dataset.
    """
    task = plain(task)
    if not isinstance(task, Mapping):
        raise ConfigError(
            f"a task must be a dict with {', '.join(REQUIRED_KEYS)} and record, got "
            f"{type(task).__name__}."
        )
    for key in REQUIRED_KEYS:
        if task.get(key) is None:
            unknown_keys = [
                k for k in task if k not in (*REQUIRED_KEYS, "record", "reweighter", "seed")
            ]
            hint = (
                f" {unknown_name('task key', unknown_keys[0], REQUIRED_KEYS)}"
                if unknown_keys
                else ""
            )
            raise ConfigError(f"the task has no {key!r}; its keys are {sorted(task)}.{hint}")
    complete = dict(task)
    if complete.get("seed") is None:
        session_seed = session().seed
        complete["seed"] = secrets.randbelow(2**31) if session_seed is None else session_seed
    complete["dataset"] = _resolve_source(complete["dataset"])
    return complete


def loggable_task(task: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a task to plain data for the run's params; live objects become configurations."""
    return {str(k): _to_plain(v) for k, v in task.items()}


def _to_plain(value: Any) -> Any:
    if isinstance(value, Configured):
        try:
            return value.to_config()
        except ConfigError:
            return type(value).__qualname__
    if isinstance(value, Mapping):
        return {str(k): _to_plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_to_plain(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return getattr(value, "__qualname__", None) or f"<{type(value).__qualname__}>"


def _resolve_source(dataset: Any) -> Any:
    """Make the data source in a dataset's configuration independent of the working folder.

    A handler without a source gets the session's; relative paths become absolute.
    """
    handler = _options(dataset).get("handler") if isinstance(dataset, Mapping) else None
    if not isinstance(handler, Mapping):
        return dataset
    options = _options(handler)
    source = options.get("source")
    if isinstance(source, Mapping):
        for key in PATH_ARGUMENTS & _options(source).keys():
            path = os.path.abspath(os.path.expanduser(str(_options(source)[key])))
            source = _set_option(source, key, path)
    elif source is None and options.get("data_loader") is None and session().provider_uri:
        provider = os.path.abspath(str(session().provider_uri))
        source = {"_target_": QLIB_SOURCE, "provider_uri": provider}
    if source is None:
        return dataset
    return _set_option(dataset, "handler", _set_option(handler, "source", source))


def _options(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments of a configuration in either form (`_target_`, or `class` with `kwargs`)."""
    options = config if "_target_" in config else config.get("kwargs") or {}
    return options if isinstance(options, Mapping) else {}


def _set_option(config: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    if "_target_" in config:
        return {**config, key: value}
    return {**config, "kwargs": {**(config.get("kwargs") or {}), key: value}}
