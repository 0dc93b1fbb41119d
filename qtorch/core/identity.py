"""Identities of tasks and trainings: hashes of canonical JSON."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from qtorch.core.configured import plain_value
from qtorch.core.errors import ConfigError
from qtorch.core.plain import convert_tree
from qtorch.core.secrets import redact_urls

# Trainer arguments that change what is printed or stored, but not the results.
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
# Locations of data and cached features; `fit_id` uses the fingerprint of the data instead.
DATA_LOCATIONS = frozenset({"source", "cache"})


def canonical_json(value: Any) -> str:
    """Return JSON text that is identical for equal configurations (sorted keys, no spaces).

    Dates become ISO text, tuples become lists, and `class` / `module_path` / `kwargs` becomes the
    `_target_` form. Raises ConfigError for live objects, NaN and infinity.
    """
    canonical = convert_tree(plain_value(value), _canonical_part)
    return json.dumps(canonical, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest(value: Any) -> str:
    """Return the first 32 hexadecimal digits of the SHA-256 of `canonical_json(value)`.

    Secrets of URLs do not count: a new password does not make another task.
    """
    return hashlib.sha256(redact_urls(canonical_json(value)).encode()).hexdigest()[:32]


def task_id(task: Mapping[str, Any]) -> str:
    """Return the id of a whole task; equal definitions have equal ids."""
    return digest(task)


def fit_id(task: Mapping[str, Any], data_fingerprint: str) -> str:
    """Return the id of a training, which covers only what changes its results.

    Model, dataset, reweighter, seed and the fingerprint of the data (of a run: of its data and
    code, `qtorch.trainer.provenance.RunInputs`) count. Records, the location
    of the data and trainer arguments that only affect printing or storing do not.
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
        "dataset": _remove_keys(plain_value(task.get("dataset")), DATA_LOCATIONS),
        "reweighter": task.get("reweighter"),
        "seed": task.get("seed"),
        "data": data_fingerprint,
    }
    return digest(parts)


def _remove_keys(value: Any, keys: frozenset[str]) -> Any:
    def remove(part: Any, _: str) -> Any:
        is_mapping = isinstance(part, dict)
        return {k: v for k, v in part.items() if k not in keys} if is_mapping else part

    return convert_tree(value, remove)


def _canonical_part(value: Any, location: str) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"a task cannot contain the number {value}: JSON cannot represent it.")
    if not isinstance(value, dict):
        return value
    key = next((k for k in ("class", "func") if isinstance(value.get(k), str)), None)
    if key is None or not set(value) <= {key, "module_path", "kwargs"}:
        return value
    module = value.get("module_path")
    name = f"{module}.{value[key]}" if module else value[key]
    return {"_target_": name, **(value.get("kwargs") or {})}
