"""What a loader's features depend on, as the key of the feature cache."""

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
from qtorch.core.names import dotted_name
from qtorch.data.filter import DynamicFilter
from qtorch.data.infinite import infinities_pass
from qtorch.data.source.base import Source

log = logging.getLogger(__name__)

OURS = "qtorch."
# What decides the numbers: a change in any of these files makes another key.
ENGINE = ("expression/*.py", "source/*.py", "*loader.py", "panel.py", "filter.py")
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
    """The key, and what is said of the entry; None where no hash tells what is computed.

    That is where a class of the user's own computes, or a live object takes part.
    """
    code = [getattr(type(loader), name) for name in ("columns_of", "needs", "fields_of_group")]
    own = [t for t in (*code, *(type(f) for f in filters)) if not t.__module__.startswith(OURS)]
    if own:
        log.info("features are not cached: %s computes them", own[0].__qualname__)
        return None
    dates = source.calendar(start_time, end_time, freq)
    if not len(dates):
        return None  # loading says it better
    span = [f"{dates[0].isoformat()}", f"{dates[-1].isoformat()}"]
    try:
        parts = {
            "engine": engine_digest(),
            "source": source.fingerprint(),
            "fields": [[g, list(f.items())] for g, f in fields.items()],
            "computed": [each.__qualname__ for each in code],
            "windowed": getattr(loader, "_windowed", None),
            "universe": plain_value(universe),
            "filters": [f.to_config() for f in filters],
            "span": span,
            "freq": freq,
            "infinite": infinities_pass(),  # what was refused or not is not looked at again
        }
        key = digest(parts)
    except ConfigError as error:
        log.info("features are not cached: %s", error)
        return None
    said = universe if isinstance(universe, str) else f"{len(universe)} instruments"
    about = {
        "source": dotted_name(type(source)).rpartition(".")[2],
        "universe": said,
        "columns": sum(len(f) for f in fields.values()),
        "span": [text[:10] for text in span],
        "freq": freq,
    }
    return key, about


@cache
def engine_digest() -> str:
    """A hash of the code that computes features, and of torch's version."""
    folder = Path(__file__).parent
    hashed = hashlib.sha256(torch.__version__.encode())
    paths = [p for pattern in (*ENGINE, *ENGINE_FILES) for p in folder.glob(pattern)]
    for path in sorted(set(paths)):
        hashed.update(path.relative_to(folder).as_posix().encode())
        hashed.update(path.read_bytes())
    return hashed.hexdigest()[:32]
