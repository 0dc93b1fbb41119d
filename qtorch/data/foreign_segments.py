"""How the segments of a dataset that is not qtorch's stand to each other: overlap and purge."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch

from qtorch.core.errors import ConfigError, ExpressionError
from qtorch.data.expression import reach
from qtorch.data.purge import check_segments
from qtorch.data.sample_set import Samples

log = logging.getLogger(__name__)


def check_dates(dataset: Any) -> None:
    """Raise ConfigError where the dates of its segments overlap, as far as it shows them."""
    if not getattr(dataset, "allow_overlap", False):
        check_segments(_spans(dataset))


def check_apart(dataset: Any, train: Samples, valid: Samples) -> None:
    """Raise ConfigError where train and valid share a day, whatever the dataset shows of itself.

    A qtorch dataset has looked at its segments' dates itself.
    """
    if callable(getattr(dataset, "samples", None)) or getattr(dataset, "allow_overlap", False):
        return
    days = [s.calendar[torch.unique(s.date).cpu().numpy()] for s in (train, valid)]
    shared = days[0].intersection(days[1])
    if len(shared):
        raise ConfigError(
            f"segments 'train' and 'valid' overlap: {type(dataset).__name__}.prepare gave "
            f"{len(shared)} days in both, the first {shared[0]:%Y-%m-%d}. Samples would be trained "
            "on and judged by."
        )


def purged_days(dataset: Any, segment: Any, horizon: int | None, *, strict: bool) -> int:
    """How many days at the end of a segment have labels that reach into another one.

    Where nothing tells how far the label looks ahead: a warning, or if `strict` a ConfigError.
    """
    if not _may_be_followed(segment, _spans(dataset)):
        return 0
    for known in (horizon, getattr(dataset, "horizon", None), _label_reach(dataset)):
        if known is not None:
            return max(0, int(known))
    how = (
        f"how far the label of {type(dataset).__name__} looks ahead is not known; give the dataset "
        "an attribute `horizon` (days)"
    )
    if strict:
        raise ConfigError(f"purge=True: {how}, or samples_of(..., horizon=...).")
    log.warning("%s: nothing is purged, %s", segment, how)
    return 0


def _spans(dataset: Any) -> dict[str, tuple[Any, Any]]:
    """The dataset's segments that are a pair of dates, by name."""
    known = getattr(dataset, "segments", None)
    pairs = known.items() if isinstance(known, Mapping) else ()
    return {str(n): (s[0], s[1]) for n, s in pairs if isinstance(s, list | tuple) and len(s) == 2}


def _may_be_followed(segment: Any, spans: Mapping[str, tuple[Any, Any]]) -> bool:
    """Whether another segment begins behind this one; True where no dates are known."""
    if isinstance(segment, slice):
        end = segment.stop
    elif str(segment) in spans:
        end = spans[str(segment)][1]
    else:
        return True
    starts = [pd.Timestamp(start) for start, _ in spans.values() if start is not None]
    return end is not None and (not spans or any(s > pd.Timestamp(end) for s in starts))


def _label_reach(dataset: Any) -> int | None:
    """How far the label's expressions look ahead, where a loader (Qlib's) shows them."""
    loader = getattr(getattr(dataset, "handler", None), "data_loader", None)
    fields = getattr(loader, "fields", None)
    label = fields.get("label") if isinstance(fields, Mapping) else None
    try:
        return max(reach(str(expression))[1] for expression in label[0]) if label else None
    except (ExpressionError, TypeError):
        return None  # an expression in a language of its own
