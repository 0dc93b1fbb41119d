"""Which samples a label's horizon takes out of a segment: pure functions on calendar rows.

A label at row d with horizon h is known only at row d + h. If that row belongs to another
segment, a model trained on the sample has seen what it is judged by (Lopez de Prado, Advances
in Financial Machine Learning, 2018, chapter 7). Qlib leaves this to the user's dates.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

import pandas as pd

from qtorch.core.errors import ConfigError, DataError
from qtorch.data.panel import normalise_calendar


def purged_rows(rows: slice, later_starts: Iterable[int], horizon: int) -> slice:
    """`rows` without those whose label reaches row `s` or later, for the first `s` behind them.

    `rows` has a start and a stop; `later_starts` are the first rows of other segments, those
    that lie before `rows.stop` are ignored. `horizon` is in calendar rows.
    """
    behind = [s for s in later_starts if s >= rows.stop]
    if not behind or horizon <= 0:
        return rows
    return slice(rows.start, max(rows.start, min(rows.stop, min(behind) - horizon)))


def check_segments(segments: Mapping[str, tuple[Any, Any]]) -> None:
    """Refuse segments whose inclusive date spans overlap, or end before they start.

    None as a bound is open. Raises ConfigError naming the two segments and their dates.
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
    for (_, end, name), (start, _, other) in pairwise(spans):
        if start <= end:
            raise ConfigError(
                f"segments {name!r} (to {end:%Y-%m-%d}) and {other!r} (from {start:%Y-%m-%d}) "
                "overlap: samples would be trained on and judged by. Both ends of a segment are "
                "inclusive; end one on the day before the other starts."
            )
