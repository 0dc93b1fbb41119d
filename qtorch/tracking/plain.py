"""Plain Python data as JSON and back, exactly: tuples, dates, NaN and keys of any plain type."""

from __future__ import annotations

import datetime
import json
import math
from typing import Any

import numpy as np
import pandas as pd

# Everything that JSON has no word for is an object with one of these keys.
_MARKS = ("$tuple", "$set", "$dict", "$float", "$timestamp", "$timedelta", "$date", "$datetime")


class NotPlainError(ValueError):
    """The value holds something other than plain data."""


def to_json(value: Any) -> str:
    """JSON text; NotPlainError for what is not plain data.

    Numpy's scalars become Python's numbers, a pandas Timestamp and Timedelta stay what they are.
    """
    return json.dumps(encode(value), ensure_ascii=False, indent=1, allow_nan=False)


def from_json(text: str | bytes) -> Any:
    """What `to_json` was given."""
    return decode(json.loads(text))


def encode(value: Any) -> Any:
    """The JSON tree of a value."""
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
    if all(type(k) is str for k in value) and not any(k in value for k in _MARKS):
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
    """The value of a JSON tree of `encode`."""
    if isinstance(tree, list):
        return [decode(v) for v in tree]
    if not isinstance(tree, dict):
        return tree
    if len(tree) == 1:
        ((mark, held),) = tree.items()
        if mark in _MARKS:
            return _decode_marked(mark, held)
    return {k: decode(v) for k, v in tree.items()}


def _decode_marked(mark: str, held: Any) -> Any:
    match mark:
        case "$tuple":
            return tuple(decode(v) for v in held)
        case "$set":
            kind = frozenset if held[0] == "frozenset" else set
            return kind(decode(v) for v in held[1:])
        case "$dict":
            return {decode(k): decode(v) for k, v in held}
        case "$float":
            return float(held)
        case "$date":
            return datetime.date.fromisoformat(held)
        case "$datetime":
            return datetime.datetime.fromisoformat(held)
        case "$timedelta":
            return pd.Timedelta(np.timedelta64(held[0], held[1]))
    if held == "NaT":
        return pd.NaT
    text, unit, zone = held
    return pd.Timestamp(text).as_unit(unit).tz_localize(zone)
