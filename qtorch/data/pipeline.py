"""Running processors: which columns they need, which dates they fit on, in what order."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import pandas as pd
import torch

from qtorch.core.dates import date_rows
from qtorch.core.errors import ArgumentError, ConfigError, DataError
from qtorch.core.heartbeat import beat
from qtorch.data.infinite import where_infinite
from qtorch.data.processor.base import FLAT, Names, Processor, in_window
from qtorch.data.view import View

log = logging.getLogger(__name__)

LABEL = "label"


class Window(NamedTuple):
    """An inclusive span of dates; None is open."""

    start: Any
    end: Any

    def __str__(self) -> str:
        return f"{_date(self.start)}..{_date(self.end)}"


def check_for_inference(processors: Sequence[Processor], argument: str) -> None:
    """Refuse processors that need a label where no label is known."""
    for processor in processors:
        if not processor.is_for_infer():
            raise ArgumentError(
                f"{argument} holds {type(processor).__name__}, which is for learning alone (it "
                "needs labels, and inference has none); move it to learn_processors."
            )


def needed_columns(processors: Sequence[Processor], names: Names) -> Names:
    """The columns that the processors' result depends on.

    A later choice of columns makes the others needless as long as every step before it treats
    each column by itself.
    """
    if FLAT in names:
        return names
    for processor in processors:
        selecting = type(processor).selects is not Processor.selects
        if not selecting and not (processor.columnwise and _by_group(processor)):
            break
        names = processor.selects(names)
    return names


def union_of_columns(one: Names, other: Names, order: Names) -> Names:
    """The columns of either, in the order of all."""
    wanted = {(g, n) for names in (one, other) for g, part in names.items() for n in part}
    return {g: tuple(n for n in part if (g, n) in wanted) for g, part in order.items()}


def check_names(processors: Sequence[Processor], names: Names) -> None:
    """Let each processor look at the names it is given; errors and warnings come from here."""
    for processor in processors:
        processor.check_names(names)
        names = processor.selects(names)


def warn_of_dropped_labels(processors: Sequence[Processor], names: Names) -> None:
    """Say it loudly where rows that are to be predicted go because of their labels."""
    for processor in processors:
        if processor.drops_by_label(names):
            log.warning(
                "%s stands before inference and drops rows by their label: what is left of a test "
                "segment was chosen with knowledge of its future, and on the newest days nothing "
                "is left. Name the features (fields_group='feature'), or use DropnaLabel among "
                "learn_processors.",
                type(processor).__name__,
            )
        names = processor.selects(names)


def run(
    view: View,
    processors: Sequence[Processor],
    *,
    fit: bool,
    window: Window | None = None,
) -> View:
    """The view after every processor; with `fit`, each is fitted on what the one before gave."""
    for processor in processors:
        began = time.perf_counter()
        beat("processors", processor=type(processor).__name__)
        if fit:
            fit_one(processor, view, window)
        processed = processor(view)
        if not processor.mends_infinite:
            _check_label(view, processed, type(processor).__name__)
        view = processed
        log.debug("%s: %.2f s", type(processor).__name__, time.perf_counter() - began)
    return view


def mends_infinite(processors: Sequence[Processor]) -> bool:
    """Whether infinities are mended before anything is learnt from them."""
    for processor in processors:
        if processor.mends_infinite:
            return True
        if processor.has_fit_window():
            return False
    return False


def _check_label(before: View, after: View, who: str) -> None:
    """Refuse a step that takes infinite labels away: ranked or clipped they look like good ones.

    What stays infinite is refused where it is to be learnt.
    """
    old, new = before.groups.get(LABEL), after.groups.get(LABEL)
    if old is None or new is None or old is new:
        return
    names = [n for n in old.names if n in new.names]
    if not any(bool(old.column(n).isinf().any()) for n in names):
        return
    infinite = torch.stack([old.column(n).isinf() for n in names])
    kept = torch.stack([new.column(n).isinf() for n in names])
    hidden = infinite & ~kept & before.rows & after.rows
    if bool(hidden.any()):
        where = where_infinite(hidden, names, before.calendar, before.instruments)
        raise DataError(
            f"{who} would hide infinite labels: {where}. Mend the label's expression (a division "
            "by zero?) or its data, or put ProcessInf before."
        )


def fit_one(processor: Processor, view: View, window: Window | None) -> None:
    """Fit one processor on its own window, else on the handler's."""
    if has_own_window(processor) or not processor.has_fit_window():
        processor.fit(view)
        return
    if window is None:
        raise ConfigError(
            f"{type(processor).__name__} learns from the data, but no fit window is known: give "
            "fit_start_time and fit_end_time, or put the handler into a dataset with a 'train' "
            "segment (its dates are then the window)."
        )
    seen = in_window(view, *window)
    if not bool(seen.rows.any()):
        dates = view.calendar
        held = f"{_date(dates[0])}..{_date(dates[-1])}" if len(dates) else "no dates"
        raise DataError(
            f"{type(processor).__name__}: the fit window {window} (the train segment, unless one "
            f"is given) holds no row; the data covers {held}."
        )
    processor.fit(seen)


def has_own_window(processor: Processor) -> bool:
    """Whether the processor itself was given the dates to fit on."""
    return processor.fit_start_time is not None or processor.fit_end_time is not None


def check_window(
    calendar: pd.DatetimeIndex, window: Window, train: Window, who: str, allow_wide: bool
) -> None:
    """Refuse a fit window that reaches beyond the train segment."""
    rows, allowed = date_rows(calendar, *window), date_rows(calendar, *train)
    if rows.start >= rows.stop or (rows.start >= allowed.start and rows.stop <= allowed.stop):
        return
    said = (
        f"{who} would be fitted on {window}, which reaches beyond the train segment {train}: the "
        "statistics would be learnt from days that the model is judged on"
        if rows.stop > allowed.stop
        else f"{who} would be fitted on {window}, which begins before the train segment {train}: "
        "the statistics would not be those of what the model is trained on"
    )
    if allow_wide:
        log.warning("%s (allow_wide_fit=True).", said)
        return
    raise ConfigError(
        f"{said}. Leave fit_start_time and fit_end_time out (the train segment is then used), or "
        "give the handler allow_wide_fit=True."
    )


def _by_group(processor: Processor) -> bool:
    """Whether its columns are named by group, so that fewer of them are still those meant."""
    asked = getattr(processor, "fields_group", None)
    return asked is None or isinstance(asked, str) or all(isinstance(a, str) for a in asked)


def _date(date: Any) -> str:
    return "" if date is None else f"{pd.Timestamp(date):%Y-%m-%d}"
