"""The key of the feature cache: a hash of everything that a loader's features depend on."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from qtorch.core.configured import plain_value
from qtorch.core.errors import ConfigError
from qtorch.core.identity import digest
from qtorch.core.names import import_path
from qtorch.data.filter import DynamicFilter
from qtorch.data.infinite import is_infinity_allowed
from qtorch.data.source.base import Source

log = logging.getLogger(__name__)

PACKAGE_PREFIX = "qtorch."
# The files whose code determines the numbers: a change in any of them changes the key.
ENGINE_PATTERNS = ("expression/*.py", "source/*.py", "*loader.py", "panel.py", "filter.py")
ENGINE_FILES = ("window_columns.py", "stored_view.py")


def feature_key(
    loader: Any,
    source: Source,
    *,
    universe: Any,
    start_time: Any,
    end_time: Any,
    freq: str,
    fields: Mapping[str, Mapping[str, str]],
    filters: Sequence[DynamicFilter],
) -> tuple[str, dict[str, Any]] | None:
    """Return the cache key and a summary of the entry; None if the features cannot be cached.

    They cannot be cached if a user's class computes them or a live object takes part, because no
    hash identifies these.
    """
    code = [
        getattr(type(loader), name) for name in ("compute_columns", "group_reach", "group_fields")
    ]
    user_code = [
        t
        for t in (*code, *(type(f) for f in filters))
        if not t.__module__.startswith(PACKAGE_PREFIX)
    ]
    if user_code:
        log.info("features are not cached: %s computes them", user_code[0].__qualname__)
        return None
    dates = source.calendar(start_time, end_time, freq)
    if not len(dates):
        return None  # loading raises a better error
    span = [f"{dates[0].isoformat()}", f"{dates[-1].isoformat()}"]
    try:
        parts = {
            "engine": engine_digest(),
            "source": source.fingerprint(),
            "fields": [[g, list(f.items())] for g, f in fields.items()],
            "computed": [each.__qualname__ for each in code],
            "windowed": getattr(loader, "_uses_windows", None),
            "universe": plain_value(universe),
            "filters": [f.to_config() for f in filters],
            "span": span,
            "freq": freq,
            "infinite": is_infinity_allowed(),  # cached data is not checked again
        }
        key = digest(parts)
    except ConfigError as error:
        log.info("features are not cached: %s", error)
        return None
    universe_text = universe if isinstance(universe, str) else f"{len(universe)} instruments"
    summary = {
        "source": import_path(type(source)).rpartition(".")[2],
        "universe": universe_text,
        "columns": sum(len(f) for f in fields.values()),
        "span": [text[:10] for text in span],
        "freq": freq,
    }
    return key, summary


@cache
def engine_digest() -> str:
    """Return a hash of the code that computes features and of torch's version."""
    folder = Path(__file__).parent
    hasher = hashlib.sha256(torch.__version__.encode())
    paths = [p for pattern in (*ENGINE_PATTERNS, *ENGINE_FILES) for p in folder.glob(pattern)]
    for path in sorted(set(paths)):
        hasher.update(path.relative_to(folder).as_posix().encode())
        hasher.update(path.read_bytes())
    return hasher.hexdigest()[:32]
