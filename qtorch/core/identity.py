"""What makes two tasks the same: canonical JSON and hashes of it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from qtorch.core.configured import plain_value
from qtorch.core.errors import ConfigError

# Arguments of a trainer that change what is shown or stored, not the numbers.
SILENT_TRAINER_ARGUMENTS = frozenset(
    {
        "default_root_dir",
        "enable_checkpointing",
        "enable_model_summary",
        "enable_progress_bar",
        "log_every_n_steps",
        "logger",
        "profiler",
    }
)
# Where data and their features lie; the data's fingerprint stands for them.
DATA_PLACES = frozenset({"source", "cache"})


def canonical_json(value: Any) -> str:
    """JSON text that is equal for equal configurations: sorted keys, no spaces.

    Dates become ISO text, tuples lists, `class` / `module_path` / `kwargs` the `_target_` form.
    Raises ConfigError for live objects and for NaN.
    """
    return json.dumps(
        _canonical(plain_value(value)), sort_keys=True, separators=(",", ":"), ensure_ascii=False
    )


def digest(value: Any) -> str:
    """32 hexadecimal digits of SHA-256 over `canonical_json(value)`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:32]


def task_id(task: Mapping[str, Any]) -> str:
    """The identity of a whole task: equal definitions, equal id."""
    return digest(task)


def fit_id(task: Mapping[str, Any], data_fingerprint: str) -> str:
    """The identity of a training: what changes its numbers, and nothing else.

    Model, dataset, reweighter and seed count; the records, the place of the data (its fingerprint
    counts instead) and trainer arguments that only show or store do not.
    """
    model = plain_value(task.get("model"))
    if isinstance(model, dict):
        options = model.get("kwargs", model)
        if isinstance(options.get("trainer"), dict):
            options["trainer"] = {
                k: v for k, v in options["trainer"].items() if k not in SILENT_TRAINER_ARGUMENTS
            }
    parts = {
        "model": model,
        "dataset": _without(plain_value(task.get("dataset")), DATA_PLACES),
        "reweighter": task.get("reweighter"),
        "seed": task.get("seed"),
        "data": data_fingerprint,
    }
    return digest(parts)


def _without(value: Any, keys: frozenset[str]) -> Any:
    if isinstance(value, dict):
        return {k: _without(v, keys) for k, v in value.items() if k not in keys}
    if isinstance(value, list):
        return [_without(v, keys) for v in value]
    return value


def _canonical(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"a task cannot hold the number {value}: JSON has no form for it.")
    if isinstance(value, list):
        return [_canonical(v) for v in value]
    if not isinstance(value, dict):
        return value
    key = next((k for k in ("class", "func") if isinstance(value.get(k), str)), None)
    if key is not None and set(value) <= {key, "module_path", "kwargs"}:
        module = value.get("module_path")
        name = f"{module}.{value[key]}" if module else value[key]
        value = {"_target_": name, **(value.get("kwargs") or {})}
    return {k: _canonical(v) for k, v in value.items()}
