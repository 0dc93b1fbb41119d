"""Nested values as JSON beside tensors, for the state of a saved model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from qtorch.core.plain import convert_tree


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
    return convert_tree(value, lambda v, _: v if _is_finite(v) else None)


def restore_nan(value: Any) -> Any:
    """Replace each None by NaN."""
    return convert_tree(value, lambda v, _: math.nan if v is None else v)


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
