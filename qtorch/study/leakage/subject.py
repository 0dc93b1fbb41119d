"""What is probed: a dataset, its copies with a changed future, and the dates of the changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from qtorch.core.dates import as_stamp, date_rows
from qtorch.core.errors import ConfigError
from qtorch.core.serial import State
from qtorch.data.dataset.dataset import TRAIN, DatasetH
from qtorch.data.handler.handler import DK_L, DK_R, DataHandler, DataHandlerLP
from qtorch.data.handler.loader import DataLoader, QlibDataLoader
from qtorch.data.panel.columns import Columns
from qtorch.data.panel.view import View
from qtorch.data.source.base import Source
from qtorch.data.source.changed import FutureChange

MIN_DAYS_BEFORE, MIN_DAYS_AFTER = 10, 3


class Subject:
    """A dataset with gaps at the dates of the changes, on which every other copy is built.

    `dates`: the data is changed after each of them; None chooses one in the first and one in the
    last segment after the train segment. Raises ConfigError for dates without enough data around
    them, and for a dataset that has no raw data.
    """

    def __init__(
        self, dataset: DatasetH, *, dates: Sequence[Any] | None = None, seed: int = 0
    ) -> None:
        _check_dataset(dataset)
        self.dataset, self.seed = dataset, seed
        calendar = _read_calendar(dataset)
        rows = (
            choose_rows(calendar, dataset.segments)
            if dates is None
            else [_date_row(calendar, date) for date in dates]
        )
        self.dates: list[pd.Timestamp] = [calendar[row] for row in rows]
        self.base = self.copy_dataset(self._change(None, "scale"))

    @property
    def handler(self) -> DataHandler:
        """The handler of the base copy."""
        return self.base.handler

    @property
    def calendar(self) -> pd.DatetimeIndex:
        """The calendar of the processed data."""
        return self.base.view().calendar

    @property
    def source(self) -> Source | None:
        """The source of bars of the dataset's handler, unchanged; None if it has none."""
        return self.dataset.handler.bars_source() if self.reads_bars else None

    @property
    def reads_bars(self) -> bool:
        """Whether the handler's columns are computed from its source of bars."""
        handler = self.dataset.handler
        has_source = handler.bars_source() is not None
        return has_source and isinstance(handler.data_loader, QlibDataLoader)

    def copy_future(self, date: pd.Timestamp, method: str) -> DatasetH:
        """Return the copy whose data after a date is changed."""
        return self.copy_dataset(self._change(date, method))

    def copy_dataset(self, change: FutureChange) -> DatasetH:
        """Return a copy of the dataset on changed data; its processors are not fitted."""
        return self.dataset.with_handler(self.dataset.handler.change_data(change))

    def with_raw_view(self, view: View) -> DatasetH:
        """Return a copy of the base on other raw data; its processors are not fitted."""
        loader = ViewLoader(view, self.handler.data_loader)
        return self.base.with_handler(self.handler.with_loader(loader, None))

    def _change(self, date: pd.Timestamp | None, method: str) -> FutureChange:
        return FutureChange(date, method, tuple(self.dates), self.seed)

    def get_fitted_state(self) -> State | None:
        """Return the fitted processors of the base copy; None if its handler has none."""
        handler = self.handler
        return handler.get_fitted_state() if isinstance(handler, DataHandlerLP) else None

    def gap_cells(self, view: View) -> Tensor:
        """Return the cells `[D, N]` of a view in which gaps were made."""
        change = self._change(None, "scale")
        names = sorted(self.source.instrument_names()) if self.source else list(view.instruments)
        cells = torch.from_numpy(change.gap_cells(view.calendar, [str(n) for n in names]))
        places = torch.from_numpy(pd.Index(names).get_indexer(view.instruments).astype("int64"))
        return cells[:, places.clamp(min=0)] & (places >= 0)

    def is_fit_window(self, date: pd.Timestamp) -> bool:
        """Whether a date lies in the train segment, whose data the processors may know."""
        if TRAIN not in self.base.segments:
            return False
        return bool(date <= self.calendar[self.segment_rows(TRAIN).stop - 1])

    def segment_rows(self, name: str) -> slice:
        """Return the calendar rows of a segment."""
        return date_rows(self.calendar, *self.base.segments[name])


class ViewLoader(DataLoader):
    """A loader that returns a view that another loader has loaded."""

    def __init__(self, view: View, loader: DataLoader) -> None:
        self.stored_view, self.loader = view, loader

    def horizon(self, group: str = "label") -> int | None:
        return self.loader.horizon(group)

    def view(
        self,
        instruments: Any = None,
        start_time: Any = None,
        end_time: Any = None,
        *,
        source: Source | None = None,
        columns: Any = None,
    ) -> View:
        return self.stored_view


def load_labels(dataset: DatasetH) -> Columns | None:
    """Return the raw labels of a dataset; None if it has no labels."""
    return dataset.handler.view(DK_R, groups=["label"]).groups.get("label")


def get_loaded_view(dataset: DatasetH) -> View:
    """Return the raw data of a dataset; of a source only the columns that its processors need."""
    dataset.view()
    return dataset.handler.get_loaded_view() or dataset.handler.view(DK_R)


def learn_view(dataset: DatasetH) -> View:
    """Return the data for learning."""
    return dataset.view(DK_L)


def choose_rows(calendar: pd.DatetimeIndex, segments: Mapping[str, tuple[Any, Any]]) -> list[int]:
    """Choose the calendar rows after which data is changed.

    They lie a third into the first segment after "train" and in the middle of the last one, so that
    the processors' fit window lies before them; without such segments, after 60% and 85%.
    """
    num_dates = len(calendar)
    rows = [int(0.6 * num_dates), int(0.85 * num_dates)]
    if TRAIN in segments:
        train_stop = date_rows(calendar, *segments[TRAIN]).stop
        spans = (date_rows(calendar, *span) for name, span in segments.items() if name != TRAIN)
        later = sorted((s.start, s.stop) for s in spans if s.start >= train_stop)
        later = [(start, stop) for start, stop in later if stop - start >= 2]
        if later:
            (start, stop), (last_start, last_stop) = later[0], later[-1]
            rows = [start + (stop - start) // 3, (last_start + last_stop) // 2]
    highest = num_dates - 1 - MIN_DAYS_AFTER
    rows = [min(row, highest) for row in rows]
    if min(rows) < MIN_DAYS_BEFORE:
        raise ConfigError(
            f"the data has {num_dates} dates, too few to change its end and compare the rest; "
            f"a probe needs {MIN_DAYS_BEFORE + MIN_DAYS_AFTER + 1} or more."
        )
    return sorted(set(rows))


def _date_row(calendar: pd.DatetimeIndex, date: Any) -> int:
    row = int(calendar.searchsorted(as_stamp(date), side="right")) - 1
    if not MIN_DAYS_BEFORE <= row < len(calendar) - MIN_DAYS_AFTER:
        raise ConfigError(
            f"dates: {date} needs {MIN_DAYS_BEFORE} days of data before it and {MIN_DAYS_AFTER} "
            f"after it; the data covers {calendar[0]:%Y-%m-%d}..{calendar[-1]:%Y-%m-%d}."
        )
    return row


def _read_calendar(dataset: DatasetH) -> pd.DatetimeIndex:
    """Return the calendar of a dataset, without loading its data if it comes from a source."""
    handler = dataset.handler
    source, loader = handler.bars_source(), handler.data_loader
    if source is not None and isinstance(loader, QlibDataLoader):
        return source.calendar(handler.start_time, handler.end_time, loader.freq)
    return handler.view(DK_R, groups=["label"]).calendar


def _check_dataset(dataset: Any) -> None:
    if not isinstance(dataset, DatasetH):
        raise ConfigError(
            f"probe needs a qtorch dataset (DatasetH, TSDatasetH or a subclass), got a "
            f"{type(dataset).__name__}."
        )
    if getattr(dataset.handler, "from_cast", False):
        raise ConfigError(
            "a handler created by cast(...) has no raw data to change; probe the dataset that it "
            "was created from."
        )
