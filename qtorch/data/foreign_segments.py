"""Overlap checks and purging for the segments of Qlib datasets."""

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


def check_segment_dates(dataset: Any) -> None:
    """Raise ConfigError if segments overlap, as far as the dataset shows their dates."""
    if not getattr(dataset, "allow_overlap", False):
        check_segments(_segment_spans(dataset))


def check_disjoint_days(dataset: Any, train: Samples, valid: Samples) -> None:
    """Raise ConfigError if train and valid share a day, judged by the samples themselves.

    qtorch datasets are skipped, because they check the dates of their segments themselves.
    """
    if callable(getattr(dataset, "samples", None)) or getattr(dataset, "allow_overlap", False):
        return
    days = [s.calendar[torch.unique(s.date).cpu().numpy()] for s in (train, valid)]
    common_days = days[0].intersection(days[1])
    if len(common_days):
        raise ConfigError(
            f"segments 'train' and 'valid' overlap: {type(dataset).__name__}.prepare returned "
            f"{len(common_days)} days in both, the first {common_days[0]:%Y-%m-%d}. The model "
            "would be validated on samples that it was trained on."
        )


def count_purged_days(dataset: Any, segment: Any, horizon: int | None, *, strict: bool) -> int:
    """Return how many days at the end of a segment have labels that reach into another segment.

    If the label's horizon is unknown, log a warning, or raise ConfigError if `strict`.
    """
    if not _has_later_segment(segment, _segment_spans(dataset)):
        return 0
    for num_days in (horizon, getattr(dataset, "horizon", None), _label_reach(dataset)):
        if num_days is not None:
            return max(0, int(num_days))
    hint = (
        f"cannot tell how far the label of {type(dataset).__name__} looks ahead; set an attribute "
        "`horizon` (days) on the dataset"
    )
    if strict:
        raise ConfigError(f"purge=True: {hint}, or get_samples(..., horizon=...).")
    log.warning("%s: no samples are purged, %s", segment, hint)
    return 0


def _segment_spans(dataset: Any) -> dict[str, tuple[Any, Any]]:
    """Return the dataset's segments that are pairs of dates, by name."""
    segments = getattr(dataset, "segments", None)
    pairs = segments.items() if isinstance(segments, Mapping) else ()
    return {str(n): (s[0], s[1]) for n, s in pairs if isinstance(s, list | tuple) and len(s) == 2}


def _has_later_segment(segment: Any, spans: Mapping[str, tuple[Any, Any]]) -> bool:
    """Whether another segment may begin after this one; True if no dates are known."""
    if isinstance(segment, slice):
        end = segment.stop
    elif str(segment) in spans:
        end = spans[str(segment)][1]
    else:
        return True
    starts = [pd.Timestamp(start) for start, _ in spans.values() if start is not None]
    return end is not None and (not spans or any(s > pd.Timestamp(end) for s in starts))


def _label_reach(dataset: Any) -> int | None:
    """Return how far the label's expressions look ahead, if a loader like Qlib's shows them."""
    loader = getattr(getattr(dataset, "handler", None), "data_loader", None)
    fields = getattr(loader, "fields", None)
    label = fields.get("label") if isinstance(fields, Mapping) else None
    try:
        return max(reach(str(expression))[1] for expression in label[0]) if label else None
    except (ExpressionError, TypeError):
        return None  # the expression is in another language
