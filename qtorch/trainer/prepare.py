"""A task as it is stored: complete, so that a worker elsewhere needs no `init`."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from typing import Any

from qtorch.core.configured import Configured
from qtorch.core.errors import ConfigError, unknown_name
from qtorch.core.instantiate import plain
from qtorch.core.session import session

NEEDED = ("model", "dataset")
PLACE, PLACE_KEYS = "tracking", ("experiment_name", "recorder_name", "uri")
QLIB_SOURCE = "qtorch.data.source.qlib.QlibSource"
PATHS = {"provider_uri", "path"}  # arguments of sources that name a place on disk


def split_place(task: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
    """A task without its `tracking`, and that: where its run belongs.

    `{"experiment_name", "recorder_name", "uri"}`, each may be missing. A trainer with a task pool
    writes it, so that a worker in another folder puts the run where the trainer's user expects it.
    It is no part of what is trained: the run's params and its artifact `task` do not show it.
    """
    if not isinstance(task, Mapping) or PLACE not in task:
        return task, {}
    place = task[PLACE] or {}
    unknown = [k for k in place if k not in PLACE_KEYS] if isinstance(place, Mapping) else [PLACE]
    if unknown:
        raise ConfigError(unknown_name(f"key of a task's {PLACE!r}", str(unknown[0]), PLACE_KEYS))
    return {k: v for k, v in task.items() if k != PLACE}, place


def complete_task(task: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the task with what the process's defaults would have filled in.

    The seed: the task's, else the session's, else a drawn one (so that the run can be repeated).
    The data source: where a handler is configured without one, the session's `provider_uri`.
    Raises ConfigError for a task without model or dataset.
    """
    task = plain(task)
    if not isinstance(task, Mapping):
        raise ConfigError(
            f"a task is a dict with {', '.join(NEEDED)} and record; got {type(task).__name__}."
        )
    for key in NEEDED:
        if task.get(key) is None:
            others = [k for k in task if k not in (*NEEDED, "record", "reweighter", "seed")]
            hint = f" {unknown_name('task key', others[0], NEEDED)}" if others else ""
            raise ConfigError(f"the task has no {key!r}; its keys are {sorted(task)}.{hint}")
    complete = dict(task)
    if complete.get("seed") is None:
        default = session().seed
        complete["seed"] = secrets.randbelow(2**31) if default is None else default
    complete["dataset"] = _with_source(complete["dataset"])
    return complete


def shown_task(task: Mapping[str, Any]) -> dict[str, Any]:
    """The task as plain data for the run's parameters; a live object shows its configuration."""
    return {str(k): _shown(v) for k, v in task.items()}


def _shown(value: Any) -> Any:
    if isinstance(value, Configured):
        try:
            return value.to_config()
        except ConfigError:
            return type(value).__qualname__
    if isinstance(value, Mapping):
        return {str(k): _shown(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_shown(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return getattr(value, "__qualname__", None) or f"<{type(value).__qualname__}>"


def _with_source(dataset: Any) -> Any:
    """The dataset's configuration with a source that means the same in any folder.

    A handler that names none gets the session's; a relative path becomes absolute.
    """
    handler = _options(dataset).get("handler") if isinstance(dataset, Mapping) else None
    if not isinstance(handler, Mapping):
        return dataset
    given = _options(handler)
    source = given.get("source")
    if isinstance(source, Mapping):
        for key in PATHS & _options(source).keys():
            path = os.path.abspath(os.path.expanduser(str(_options(source)[key])))
            source = _replaced(source, key, path)
    elif source is None and given.get("data_loader") is None and session().provider_uri:
        provider = os.path.abspath(str(session().provider_uri))
        source = {"_target_": QLIB_SOURCE, "provider_uri": provider}
    if source is None:
        return dataset
    return _replaced(dataset, "handler", _replaced(handler, "source", source))


def _options(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments in a configuration of either form (`_target_`, or `class` with `kwargs`)."""
    options = config if "_target_" in config else config.get("kwargs") or {}
    return options if isinstance(options, Mapping) else {}


def _replaced(config: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    if "_target_" in config:
        return {**config, key: value}
    return {**config, "kwargs": {**(config.get("kwargs") or {}), key: value}}
