"""Lossless JSON for plain Python data: also tuples, sets, dates, NaN and non-text keys."""

from __future__ import annotations

import datetime
import math
from typing import Any

import numpy as np
import pandas as pd

from qtorch.core.plain import convert_tree
from qtorch.core.trust import StoredText

# A value that JSON cannot express becomes an object with exactly one of these keys.
_TAGS = ("$tuple", "$set", "$dict", "$float", "$timestamp", "$timedelta", "$date", "$datetime")


class NotPlainError(ValueError):
    """The value contains something that is not plain data."""


def encode(value: Any) -> Any:
    """Encode a value as a tree of JSON values; raise NotPlainError if it is not plain data.

    NumPy scalars become Python numbers; pandas Timestamp and Timedelta keep their type.
    """
    return convert_tree(value, _encode_part)


def _encode_part(value: Any, location: str) -> Any:
    if isinstance(value, StoredText):
        return str(value)
    kind = type(value)
    if value is None or kind in (bool, int, str, list):
        return value
    if kind is dict:
        has_text_keys = {type(k) for k in value} <= {str, StoredText}
        is_plain = has_text_keys and not any(k in value for k in _TAGS)
        return value if is_plain else {"$dict": [[k, v] for k, v in value.items()]}
    if kind is tuple:
        return {"$tuple": list(value)}
    if kind in (set, frozenset):
        return {"$set": [kind.__name__, *sorted(value, key=lambda v: repr(encode(v)))]}
    if isinstance(value, np.bool_ | np.integer):
        return value.item()
    if isinstance(value, float | np.floating):
        number = float(value)
        return number if math.isfinite(number) else {"$float": repr(number)}
    return _encode_time(value)


def _encode_time(value: Any) -> Any:
    if value is pd.NaT:
        return {"$timestamp": "NaT"}
    if isinstance(value, pd.Timestamp):
        zone = None if value.tz is None else str(value.tz)
        return {"$timestamp": [value.tz_localize(None).isoformat(), value.unit, zone]}
    if isinstance(value, pd.Timedelta):
        return {"$timedelta": [int(value.asm8.view("i8")), value.unit]}
    if isinstance(value, datetime.datetime) and value.tzinfo is None:
        return {"$datetime": value.isoformat()}
    if type(value) is datetime.date:
        return {"$date": value.isoformat()}
    raise NotPlainError(f"{type(value).__module__}.{type(value).__qualname__} is not plain data")


def decode(tree: Any) -> Any:
    """Rebuild the value from a JSON tree written by `encode`."""
    if isinstance(tree, list):
        return [decode(v) for v in tree]
    if not isinstance(tree, dict):
        return tree
    if len(tree) == 1:
        ((tag, payload),) = tree.items()
        if tag in _TAGS:
            return _decode_tag(tag, payload)
    return {k: decode(v) for k, v in tree.items()}


def _decode_tag(tag: str, payload: Any) -> Any:
    match tag:
        case "$tuple":
            return tuple(decode(v) for v in payload)
        case "$set":
            kind = frozenset if payload[0] == "frozenset" else set
            return kind(decode(v) for v in payload[1:])
        case "$dict":
            return {decode(k): decode(v) for k, v in payload}
        case "$float":
            return float(payload)
        case "$date":
            return datetime.date.fromisoformat(payload)
        case "$datetime":
            return datetime.datetime.fromisoformat(payload)
        case "$timedelta":
            return pd.Timedelta(np.timedelta64(payload[0], payload[1]))
    if payload == "NaT":
        return pd.NaT
    text, unit, zone = payload
    return pd.Timestamp(text).as_unit(unit).tz_localize(zone)
