"""Building and running lists of processors: the columns they need, the dates they are fitted on."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch

from qtorch.core.dates import as_stamp, date_rows, last_date
from qtorch.core.errors import ArgumentError, ConfigError, DataError
from qtorch.core.instantiate import init_instance_by_config, resolve_config
from qtorch.data.panel.infinite import describe_infinities
from qtorch.data.panel.panel import coverage_dates
from qtorch.data.panel.view import FLAT, View
from qtorch.data.processor.base import LABEL, Names, Processor, select_dates
from qtorch.data.processor.pandas_processor import PandasProcessor
from qtorch.process.heartbeat import beat

log = logging.getLogger(__name__)

MODULE = "qtorch.data.processor"


class DateSpan(NamedTuple):
    """An inclusive span of dates; None is open."""

    start: Any
    end: Any

    def __str__(self) -> str:
        start = "" if self.start is None else f"{as_stamp(self.start):%Y-%m-%d}"
        end = "" if self.end is None else f"{last_date(self.end):%Y-%m-%d}"
        return f"{start}..{end}"


def check_infer_processors(processors: Sequence[Processor], argument: str) -> None:
    """Raise ArgumentError for processors that need a label in a list that is used for inference."""
    for processor in processors:
        if not processor.is_for_infer():
            raise ArgumentError(
                f"{argument} contains {type(processor).__name__}, which needs labels and can only "
                "be used for learning; move it to learn_processors."
            )


def find_needed_columns(processors: Sequence[Processor], names: Names) -> Names:
    """Return the columns that the processors' result depends on.

    If a later processor selects columns, the others are not needed, as long as every processor
    before it treats each column separately.
    """
    if FLAT in names:
        return names
    for processor in processors:
        selects_columns = type(processor).output_columns is not Processor.output_columns
        if not selects_columns and not (processor.columnwise and _selects_by_group(processor)):
            break
        names = processor.output_columns(names)
    return names


def merge_column_names(first: Names, second: Names, order: Names) -> Names:
    """Return the columns of `first` and `second` in the order of `order`."""
    pairs = {(g, n) for names in (first, second) for g, part in names.items() for n in part}
    return {g: tuple(n for n in part if (g, n) in pairs) for g, part in order.items()}


def check_names(processors: Sequence[Processor], names: Names) -> None:
    """Let each processor check the column names of its input and raise errors or warnings."""
    for processor in processors:
        processor.check_names(names)
        names = processor.output_columns(names)


def warn_about_label_drops(processors: Sequence[Processor], names: Names) -> None:
    """Warn if rows that are to be predicted are dropped because of their labels."""
    for processor in processors:
        if processor.drops_by_label(names):
            log.warning(
                "%s runs before inference and drops rows by their label: the remaining test rows "
                "are selected with knowledge of the future, and the newest days have no rows at "
                "all. Restrict it to the features (fields_group='feature'), or use DropnaLabel in "
                "learn_processors.",
                type(processor).__name__,
            )
        names = processor.output_columns(names)


def run(
    view: View,
    processors: Sequence[Processor],
    *,
    fit: bool,
    window: DateSpan | None = None,
) -> View:
    """Run every processor on the view; with `fit`, fit each on the output of the one before."""
    for processor in processors:
        start_time = time.perf_counter()
        beat("processors", processor=type(processor).__name__)
        if fit:
            fit_processor(processor, view, window)
        result = processor(view)
        if not processor.replaces_infinite:
            _check_label(view, result, type(processor).__name__)
        view = result
        log.debug("%s: %.2f s", type(processor).__name__, time.perf_counter() - start_time)
    return view


def replaces_infinite(processors: Sequence[Processor]) -> bool:
    """Whether infinities are replaced before any processor is fitted."""
    for processor in processors:
        if processor.replaces_infinite:
            return True
        if processor.has_fit_window():
            return False
    return False


def _check_label(before: View, after: View, processor_name: str) -> None:
    """Raise DataError if a processor hides infinite labels; once ranked or clipped they look valid.

    Labels that stay infinite are refused later, when samples for learning are built.
    """
    old, new = before.groups.get(LABEL), after.groups.get(LABEL)
    if old is None or new is None or old is new:
        return
    names = [n for n in old.names if n in new.names]
    if not any(bool(old.column(n).isinf().any()) for n in names):
        return
    infinite = torch.stack([old.column(n).isinf() for n in names])
    still_infinite = torch.stack([new.column(n).isinf() for n in names])
    hidden = infinite & ~still_infinite & before.rows & after.rows
    if bool(hidden.any()):
        location = describe_infinities(hidden, names, before.calendar, before.instruments)
        raise DataError(
            f"{processor_name} would hide infinite labels: {location}. Fix the label's expression "
            "(is it a division by zero?) or its data, or put ProcessInf before it."
        )


def fit_processor(processor: Processor, view: View, window: DateSpan | None) -> None:
    """Fit one processor on its own window, else on the handler's."""
    if has_own_window(processor) or not processor.has_fit_window():
        processor.fit(view)
        return
    if window is None:
        raise ConfigError(
            f"{type(processor).__name__} needs a fit window: pass fit_start_time and "
            "fit_end_time, or use the handler in a dataset with a 'train' segment, whose dates "
            "are then the fit window."
        )
    fit_view = select_dates(view, *window)
    if not bool(fit_view.rows.any()):
        raise DataError(
            f"{type(processor).__name__}: the fit window {window} (the train segment, unless one "
            f"is set) has no rows; the data covers {coverage_dates(view.calendar)}."
        )
    processor.fit(fit_view)


def has_own_window(processor: Processor) -> bool:
    """Whether the processor has its own dates to fit on."""
    return processor.fit_start_time is not None or processor.fit_end_time is not None


def check_window(
    calendar: pd.DatetimeIndex,
    window: DateSpan,
    train: DateSpan,
    processor_name: str,
    allow_wide: bool,
) -> None:
    """Raise ConfigError for a fit window that reaches beyond the train segment."""
    rows, train_rows = date_rows(calendar, *window), date_rows(calendar, *train)
    if rows.start >= rows.stop or (rows.start >= train_rows.start and rows.stop <= train_rows.stop):
        return
    message = (
        f"{processor_name} would be fitted on {window}, which reaches beyond the train segment "
        f"{train}: its statistics would come from days that the model is evaluated on"
        if rows.stop > train_rows.stop
        else f"{processor_name} would be fitted on {window}, which begins before the train segment "
        f"{train}: its statistics would not be those of the training data"
    )
    if allow_wide:
        log.warning("%s (allow_wide_fit=True).", message)
        return
    raise ConfigError(
        f"{message}. Leave out fit_start_time and fit_end_time to use the train segment, or set "
        "allow_wide_fit=True on the handler."
    )


def _selects_by_group(processor: Processor) -> bool:
    """Whether the processor names its columns by group, so that it also works on fewer columns."""
    groups = processor.fields_group
    return groups is None or isinstance(groups, str) or all(isinstance(a, str) for a in groups)


# -- building --------------------------------------------------------------------------------------


def build_processor(config: Any) -> Processor:
    """Build a processor from a configuration, a class name, or an object.

    Accepts Qlib's `{"class": "Fillna", "kwargs": {...}}`, `{"_target_": ...}`, and the names of
    classes in `qtorch.data.processor`. A callable that is not a Processor is treated as a pandas
    processor with Qlib's protocol.
    """
    config = resolve_config(config)
    is_config = isinstance(config, str | Mapping | Path)
    instance = init_instance_by_config(config, MODULE) if is_config else config
    return instance if isinstance(instance, Processor) else PandasProcessor(config)


def build_processors(configs: Sequence[Any] | None, argument: str) -> list[Processor]:
    """Build a list of processors; `argument` is its name in error messages."""
    if configs is None:
        return []
    configs = resolve_config(configs)
    if isinstance(configs, str | Mapping) or not isinstance(configs, Sequence):
        raise ConfigError(
            f"{argument} must be a list of processors, got {configs!r:.80}; write [{{...}}]."
        )
    return [build_processor(c) for c in configs]
