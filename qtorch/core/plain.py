"""The traversal that turns nested values into plain data: dicts, lists, text, numbers, None.

Configurations, identities, artifacts, results of tasks and params of runs differ only in how they
convert a single part of a value.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any


def convert_tree(value: Any, convert: Callable[[Any, str], Any], location: str = "value") -> Any:
    """Return a nested value as dicts and lists, with each part converted, the outermost first.

    `convert(part, location)` returns the part or a replacement. If that is a mapping, a list or a
    tuple, its own parts are converted next, otherwise it is final. Keys become text. `location`
    is the path of the part for error messages, e.g. `task.record[0]`.
    """
    part = convert(value, location)
    if isinstance(part, Mapping):
        return {_text(k): convert_tree(v, convert, f"{location}.{k}") for k, v in part.items()}
    if isinstance(part, list | tuple):
        return [convert_tree(v, convert, f"{location}[{k}]") for k, v in enumerate(part)]
    return part


def _text(key: Any) -> str:
    return key if isinstance(key, str) else str(key)


def is_plain_scalar(value: Any) -> bool:
    """Whether the value is None, a bool, a number or text."""
    return value is None or isinstance(value, bool | int | float | str)


def is_numpy_scalar(value: Any) -> bool:
    """Whether the value is a numpy scalar (checked without importing numpy)."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.generic)


def resolve_config(value: Any) -> Any:
    """Return a value with OmegaConf's configs as dicts and lists, interpolations resolved.

    They are looked for within dicts, lists and tuples too. Anything else is returned unchanged.
    """
    omegaconf = sys.modules.get("omegaconf")  # without it there are no such configs
    if omegaconf is None:
        return value
    if omegaconf.OmegaConf.is_config(value):
        return omegaconf.OmegaConf.to_container(value, resolve=True)
    if type(value) is dict:
        resolved = {k: resolve_config(v) for k, v in value.items()}
        return resolved if any(resolved[k] is not v for k, v in value.items()) else value
    if type(value) in (list, tuple):
        parts = [resolve_config(v) for v in value]
        is_same = all(a is b for a, b in zip(parts, value, strict=True))
        return value if is_same else type(value)(parts)
    return value
