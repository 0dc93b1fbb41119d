"""Purging: which samples a label's horizon removes from a segment, as functions on calendar rows.

A label at row d with horizon h is only known at row d + h. If that row belongs to another
segment, a model that is trained on the sample has seen data that it is evaluated on (Lopez de
Prado, Advances in Financial Machine Learning, 2018, chapter 7). Qlib leaves this to the user.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

import pandas as pd

from qtorch.core.errors import ConfigError, DataError
from qtorch.data.panel import normalise_calendar


def purge_rows(rows: slice, later_starts: Iterable[int], horizon: int) -> slice:
    """Remove from `rows` those whose label reaches the first later segment start.

    `rows` has a start and a stop; `later_starts` are the first rows of other segments, of which
    those before `rows.stop` are ignored. `horizon` is in calendar rows.
    """
    next_starts = [s for s in later_starts if s >= rows.stop]
    if not next_starts or horizon <= 0:
        return rows
    return slice(rows.start, max(rows.start, min(rows.stop, min(next_starts) - horizon)))


def check_segments(segments: Mapping[str, tuple[Any, Any]]) -> None:
    """Raise ConfigError for segments whose inclusive date spans overlap or end before they start.

    None as a bound is open. The message names the two segments and their dates.
    """
    spans = []
    for name, (start, end) in segments.items():
        try:
            first = pd.Timestamp.min if start is None else normalise_calendar([start])[0]
            last = pd.Timestamp.max if end is None else normalise_calendar([end])[0]
        except DataError as error:
            raise ConfigError(f"segment {name!r} ({start}..{end}): {error}") from error
        if last < first:
            raise ConfigError(f"segment {name!r} ends ({end}) before it starts ({start}).")
        spans.append((first, last, name))
    spans.sort()
    for (_, end, name), (start, _, next_name) in pairwise(spans):
        if start <= end:
            raise ConfigError(
                f"segments {name!r} (to {end:%Y-%m-%d}) and {next_name!r} (from {start:%Y-%m-%d}) "
                "overlap, so the model would be evaluated on samples that it was trained on. Both "
                "ends of a segment are inclusive: end one on the day before the other starts."
            )
