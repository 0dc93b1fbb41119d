"""The samples of a view between two dates."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qtorch.core.errors import DataError
from qtorch.core.wording import counted
from qtorch.data.columns import Columns
from qtorch.data.extras import Extra
from qtorch.data.gather import infinite_message
from qtorch.data.purge import purged_rows
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
    """The samples of a view between two dates, both inclusive.

    `rows [D, N]` bool narrows the view's rows further. With a `horizon` (calendar rows that the
    label looks ahead) and the start dates of the other segments, samples whose label reaches
    into the next segment are left out, and the log says how many. For `learn`, rows whose
    labels are all NaN are left out too (a row with some labels keeps its NaN, for the loss to
    mask); for prediction every row of the view is a sample. Without the label's group the
    samples have no target. Raises DataError for a segment without samples, a label that is NaN
    everywhere, and for `learn` infinite labels (features are looked at when they are packed).
    """
    asked = view.date_rows(start, end)
    starts = [view.date_rows(date).start for date in later_starts]
    date, instrument = view.sample_rows(purged_rows(asked, starts, horizon), rows)
    notes = {"purged": len(view.sample_rows(asked, rows)[0]) - len(date)}
    if not len(date):
        raise DataError(_empty(view, name, start, end, notes["purged"]))
    features = view.group(feature_group)
    labels = view.groups.get(label_group)
    target = _at(labels, date, instrument, learn)
    raw = _at(raw_label, date, instrument)
    if learn and labels is not None and target is not None:
        known = labelled(f"{name} ({start}..{end})", labels.names, target)
        notes["unlabelled"] = int((~known).sum())
        date, instrument, target = date[known], instrument[known], target[known]
        raw = None if raw is None else raw[known]
    say_samples(name, len(date), notes, horizon)
    return Samples(
        features,
        date,
        instrument,
        calendar=view.calendar,
        instruments=view.instruments,
        feature_names=features.names,
        label_names=() if labels is None else labels.names,
        target=target,
        raw_label=raw,
        history=view.history,
        step_len=step_len,
        fill=fill,
        notes=notes,
        extras={k: e.bind(view.calendar, view.instruments) for k, e in (extras or {}).items()},
        horizon=horizon or None,
    )


def _at(
    columns: Columns | None, date: Tensor, instrument: Tensor, learn: bool = False
) -> Tensor | None:
    """Labels `[S, Q]` of the samples; None where there are none."""
    if columns is None or not columns.names:
        return None
    values = torch.stack([columns.column(n)[date, instrument] for n in columns.names], 1)
    return finite_labels(columns.names, values, learn)


def finite_labels(names: Sequence[str], target: Tensor, learn: bool) -> Tensor:
    """The labels, whose infinities are an error for learning and unknown otherwise."""
    bad = target.isinf().any(0)
    if not bool(bad.any()):
        return target
    if learn:
        wrong = [n for n, inf in zip(names, bad.tolist(), strict=True) if inf]
        raise DataError(infinite_message(wrong, "labels"))
    return target.masked_fill(target.isinf(), float("nan"))


def labelled(where: str, names: Sequence[str], target: Tensor) -> Tensor:
    """`[S]` bool: samples with any label; a DataError where there is none at all."""
    known = ~target.isnan().all(1)
    if not bool(known.any()):
        raise DataError(
            f"{where}: the label {list(names)} is NaN in all {len(target)} samples. Look at the "
            "label's expression, its data, and whether the dates behind the segment are loaded."
        )
    return known


def _empty(view: View, name: str, start: Any, end: Any, purged: int) -> str:
    span = (
        f"{view.calendar[0]:%Y-%m-%d}..{view.calendar[-1]:%Y-%m-%d}" if len(view.calendar) else ""
    )
    gone = counted(purged, "sample was", "samples were")
    why = f"; {gone} purged by the label's horizon" if purged else ""
    asked = view.history[view.date_rows(start, end)]
    if bool(asked.any()) and not purged:
        return (
            f"{name} ({start}..{end}) holds no sample: the processors dropped all its "
            f"{int(asked.sum())} rows. Is the label NaN everywhere (its expression, its data)?"
        )
    return (
        f"{name} ({start}..{end}) holds no sample: the data covers {span or 'no dates'} with "
        f"{int(view.rows.sum())} sample rows of {len(view.instruments)} instruments{why}. Check "
        "the segment's dates, the universe and the processors that drop rows."
    )


def say_samples(name: str, count: int, notes: Mapping[str, int], horizon: int) -> None:
    """Log how many samples a segment has, and how many were left out for which reason."""
    log.info("%s: %s samples", name, f"{count:,}")
    if notes.get("purged"):
        log.info(
            "%s: %s samples purged, their labels reach into the next segment (horizon %d days)",
            name,
            f"{notes['purged']:,}",
            horizon,
        )
    if notes.get("unlabelled"):
        log.info("%s: %s rows without label left out", name, f"{notes['unlabelled']:,}")
