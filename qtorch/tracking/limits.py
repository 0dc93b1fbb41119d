"""What MLflow takes: names, lengths, numbers, times."""

from __future__ import annotations

import logging
import re
import time
from datetime import datetime
from typing import Any

from qtorch.core.errors import ArgumentError

log = logging.getLogger(__name__)

MAX_PARAM, MAX_TAG, MAX_KEY = 6000, 8000, 250
_BAD_IN_KEY = re.compile(r"[^\w\-. :/]")


def now() -> int:
    """Milliseconds since 1970, UTC."""
    return time.time_ns() // 1_000_000


def local_time(milliseconds: int | None) -> str | None:
    """As text, in this machine's time zone."""
    if milliseconds is None:
        return None
    return datetime.fromtimestamp(milliseconds / 1000).strftime("%Y-%m-%d %H:%M:%S")


_said: set[str] = set()


def say_once(message: str) -> None:
    """A warning that this process gives once."""
    if message not in _said and len(_said) < 1000:
        _said.add(message)
        log.warning(message)


def clean_key(name: str) -> str:
    """A name that MLflow takes: it knows letters, digits and `_-. :/`, at most 250 of them."""
    key = "/".join(p if p.strip(".") else "_" for p in _BAD_IN_KEY.sub("_", str(name)).split("/"))
    if len(key) > MAX_KEY:
        key = key[:MAX_KEY]
    if key != name:
        say_once(f"{name!r} is logged as {key!r}: MLflow takes no such name")
    return key


def number(name: str, value: Any) -> float:
    """The value of a metric; ArgumentError for what is no number."""
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"metric {name!r} is {value!r}; a metric is one number.") from error
