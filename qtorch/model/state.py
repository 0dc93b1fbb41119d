"""Nested values as JSON beside tensors, for the state of a saved model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def extract_tensors(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Replace each tensor in a nested value by a name and store it in `tensors` under that name.

    Mappings are saved as lists of pairs because their keys may be numbers.
    """
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().clone()
        return {"@tensor": name}
    if isinstance(value, Mapping):
        pairs = [[k, extract_tensors(v, f"{name}{k}.", tensors)] for k, v in value.items()]
        return {"@map": pairs}
    if isinstance(value, list | tuple):
        return [extract_tensors(v, f"{name}{k}.", tensors) for k, v in enumerate(value)]
    return value


def insert_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Rebuild the value that `extract_tensors` was called with."""
    if isinstance(value, Mapping):
        if "@tensor" in value:
            return tensors[value["@tensor"]]
        return {k: insert_tensors(v, tensors) for k, v in value["@map"]}
    return [insert_tensors(v, tensors) for v in value] if isinstance(value, list) else value


def replace_nonfinite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON cannot represent, by None."""
    if isinstance(value, Mapping):
        return {k: replace_nonfinite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [replace_nonfinite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def restore_nan(value: Any) -> Any:
    """Replace each None by NaN."""
    if isinstance(value, Mapping):
        return {k: restore_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [restore_nan(v) for v in value]
    return math.nan if value is None else value
