"""Building the samples of a view between two dates."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qtorch.core.errors import DataError
from qtorch.core.wording import format_count
from qtorch.data.columns import Columns
from qtorch.data.extras import Extra
from qtorch.data.gather import infinite_message
from qtorch.data.purge import purge_rows
from qtorch.data.sample_set import Samples
from qtorch.data.view import View

log = logging.getLogger(__name__)


def build_samples(
    view: View,
    *,
    start: Any = None,
    end: Any = None,
    name: str = "segment",
    raw_label: Columns | None = None,
    step_len: int = 1,
    fill: str = "ffill+bfill",
    feature_group: str = "feature",
    label_group: str = "label",
    rows: Tensor | None = None,
    horizon: int = 0,
    later_starts: Iterable[Any] = (),
    learn: bool = False,
    extras: Mapping[str, Extra] | None = None,
) -> Samples:
    """Build the samples of a view between two dates, both inclusive.

    `rows [D, N]` bool restricts the view's rows further. With a `horizon` (calendar rows that the
    label looks ahead) and the start dates of the other segments, samples whose label reaches
    into the next segment are left out, and their number is logged. With `learn`, rows whose
    labels are all NaN are left out too (a row with some labels keeps its NaN, which the loss
    masks); for prediction every row of the view is a sample. Without the label's group the
    samples have no target. Raises DataError for a segment without samples, a label that is NaN
    everywhere, and with `learn` for infinite labels (features are checked when they are packed).
    """
    segment_rows = view.date_rows(start, end)
    starts = [view.date_rows(date).start for date in later_starts]
    date, instrument = view.sample_rows(purge_rows(segment_rows, starts, horizon), rows)
    notes = {"purged": len(view.sample_rows(segment_rows, rows)[0]) - len(date)}
    if not len(date):
        raise DataError(_empty_message(view, name, start, end, notes["purged"]))
    features = view.group(feature_group)
    labels = view.groups.get(label_group)
    target = _gather_labels(labels, date, instrument, learn)
    raw_values = _gather_labels(raw_label, date, instrument)
    if learn and labels is not None and target is not None:
        has_label = label_mask(f"{name} ({start}..{end})", labels.names, target)
        notes["unlabelled"] = int((~has_label).sum())
        date, instrument, target = date[has_label], instrument[has_label], target[has_label]
        raw_values = None if raw_values is None else raw_values[has_label]
    log_samples(name, len(date), notes, horizon)
    return Samples(
        features,
        date,
        instrument,
        calendar=view.calendar,
        instruments=view.instruments,
        feature_names=features.names,
        label_names=() if labels is None else labels.names,
        target=target,
        raw_label=raw_values,
        history=view.history,
        step_len=step_len,
        fill=fill,
        notes=notes,
        extras={k: e.bind(view.calendar, view.instruments) for k, e in (extras or {}).items()},
        horizon=horizon or None,
    )


def _gather_labels(
    columns: Columns | None, date: Tensor, instrument: Tensor, learn: bool = False
) -> Tensor | None:
    """Return labels `[S, Q]` of the samples; None if there are no columns."""
    if columns is None or not columns.names:
        return None
    values = torch.stack([columns.column(n)[date, instrument] for n in columns.names], 1)
    return finite_labels(columns.names, values, learn)


def finite_labels(names: Sequence[str], target: Tensor, learn: bool) -> Tensor:
    """Return the labels; infinities raise DataError for learning and become NaN otherwise."""
    is_infinite = target.isinf().any(0)
    if not bool(is_infinite.any()):
        return target
    if learn:
        infinite_names = [
            n for n, has_infinity in zip(names, is_infinite.tolist(), strict=True) if has_infinity
        ]
        raise DataError(infinite_message(infinite_names, "labels"))
    return target.masked_fill(target.isinf(), float("nan"))


def label_mask(segment: str, names: Sequence[str], target: Tensor) -> Tensor:
    """Return `[S]` bool: samples with at least one label; raise DataError if there are none."""
    has_label = ~target.isnan().all(1)
    if not bool(has_label.any()):
        raise DataError(
            f"{segment}: the label {list(names)} is NaN in all {len(target)} samples. Check the "
            "label's expression, its data, and whether the dates after the segment are loaded."
        )
    return has_label


def _empty_message(view: View, name: str, start: Any, end: Any, num_purged: int) -> str:
    span = (
        f"{view.calendar[0]:%Y-%m-%d}..{view.calendar[-1]:%Y-%m-%d}" if len(view.calendar) else ""
    )
    purged_text = format_count(num_purged, "sample was", "samples were")
    reason = f"; {purged_text} purged by the label's horizon" if num_purged else ""
    has_row = view.history[view.date_rows(start, end)]
    if bool(has_row.any()) and not num_purged:
        return (
            f"{name} ({start}..{end}) has no samples: the processors dropped all of its "
            f"{int(has_row.sum())} rows. Check whether the label is NaN everywhere."
        )
    return (
        f"{name} ({start}..{end}) has no samples: the data covers {span or 'no dates'} with "
        f"{int(view.rows.sum())} sample rows of {len(view.instruments)} instruments{reason}. Check "
        "the segment's dates, the universe and the processors that drop rows."
    )


def log_samples(name: str, count: int, notes: Mapping[str, int], horizon: int) -> None:
    """Log how many samples a segment has, and how many were left out and why."""
    log.info("%s: %s samples", name, f"{count:,}")
    if notes.get("purged"):
        log.info(
            "%s: purged %s samples whose labels reach into the next segment (horizon %d days)",
            name,
            f"{notes['purged']:,}",
            horizon,
        )
    if notes.get("unlabelled"):
        log.info("%s: left out %s rows without a label", name, f"{notes['unlabelled']:,}")
