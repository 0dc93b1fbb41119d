"""Lossless JSON for plain Python data: also tuples, sets, dates, NaN and non-text keys."""

from __future__ import annotations

import datetime
import json
import math
from typing import Any

import numpy as np
import pandas as pd

# A value that JSON cannot express becomes an object with exactly one of these keys.
_TAGS = ("$tuple", "$set", "$dict", "$float", "$timestamp", "$timedelta", "$date", "$datetime")


class NotPlainError(ValueError):
    """The value contains something that is not plain data."""


def to_json(value: Any) -> str:
    """Serialize a value to JSON text; raise NotPlainError if it is not plain data.

    NumPy scalars become Python numbers; pandas Timestamp and Timedelta keep their type.
    """
    return json.dumps(encode(value), ensure_ascii=False, indent=1, allow_nan=False)


def from_json(text: str | bytes) -> Any:
    """Return the value that `to_json` serialized."""
    return decode(json.loads(text))


def encode(value: Any) -> Any:
    """Encode a value as a tree of JSON values."""
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, np.bool_ | np.integer):
        return value.item()
    if isinstance(value, float | np.floating):
        number = float(value)
        return number if math.isfinite(number) else {"$float": repr(number)}
    if type(value) is dict:
        return _encode_dict(value)
    if type(value) is list:
        return [encode(v) for v in value]
    if type(value) is tuple:
        return {"$tuple": [encode(v) for v in value]}
    if type(value) in (set, frozenset):
        kind = type(value).__name__
        return {"$set": [kind, *sorted((encode(v) for v in value), key=repr)]}
    return _encode_time(value)


def _encode_dict(value: dict[Any, Any]) -> Any:
    if all(type(k) is str for k in value) and not any(k in value for k in _TAGS):
        return {k: encode(v) for k, v in value.items()}
    return {"$dict": [[encode(k), encode(v)] for k, v in value.items()]}


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
