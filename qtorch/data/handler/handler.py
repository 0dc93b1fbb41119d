"""The handler with processors: raw data and its processed views for inference and learning."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import pandas as pd

from qtorch.core.configured import Configured, copy_attributes
from qtorch.core.dates import date_rows
from qtorch.core.errors import ConfigError, DataError, NotFittedError, unknown_name_message
from qtorch.core.serial import Serializable, State
from qtorch.core.session import session
from qtorch.core.tables import as_pandas
from qtorch.core.trust import trust_subclasses
from qtorch.data.handler.feature_cache import use_feature_cache
from qtorch.data.handler.feature_device import check_feature_device, use_feature_device
from qtorch.data.handler.fetch import (
    CS_ALL,
    CS_RAW,
    column_set_names,
    fetch_frame,
    select_column_set,
    squeeze_frame,
)
from qtorch.data.handler.loader import DataChange, DataLoader, StaticDataLoader, build_loader
from qtorch.data.panel.frames import index_frame
from qtorch.data.panel.infinite import infinity_policy
from qtorch.data.panel.panel import coverage_dates
from qtorch.data.panel.view import View
from qtorch.data.processor import pipeline
from qtorch.data.processor.base import Names, Processor, column_names
from qtorch.data.processor.pipeline import DateSpan, build_processors
from qtorch.data.source.base import Source
from qtorch.data.source.frame import build_source, default_source

DK_R, DK_I, DK_L = "raw", "infer", "learn"
DATA_KEYS = (DK_R, DK_I, DK_L)


@trust_subclasses
class DataHandler(Configured, Serializable):
    """Load raw data on first use, and return it by dates and columns.

    `instruments`: a universe's name, a list, or None for all. Dates are inclusive. `data_loader`:
    a loader, its configuration, or a DataFrame. `source`: the source of the bars (a Source, its
    configuration, or a folder in Qlib's layout); None uses that of `qtorch.init`. `cache` stores
    the loader's features on disk and shares them with other tasks (True: in QTORCH_CACHE; or a
    path; see `feature_cache`). `device` computes the features of expressions: "cpu", "cuda",
    "cuda:1", or "auto" for the first GPU if there is one; the values of a GPU equal those of the
    CPU up to rounding, and are then in host memory too. `init_data=True` loads immediately (Qlib's
    default).
    `fetch_orig` exists for compatibility with Qlib: fetched frames are always copies. Infinite
    bars, or infinite values in a user's frame, raise a DataError with their location.

    `view(data_key)` returns tensors (`View`), `fetch` DataFrames. Corresponds to
    qlib/data/dataset/handler.py.
    """

    CS_ALL: ClassVar[str] = CS_ALL
    CS_RAW: ClassVar[str] = CS_RAW
    DK_R: ClassVar[str] = DK_R
    DK_I: ClassVar[str] = DK_I
    DK_L: ClassVar[str] = DK_L

    _raw: View | None = None

    def __init__(
        self,
        instruments: Any = None,
        start_time: Any = None,
        end_time: Any = None,
        data_loader: Any = None,
        init_data: bool = False,
        fetch_orig: bool = True,
        *,
        source: Any = None,
        cache: bool | str | Path = False,
        device: str = "cpu",
    ) -> None:
        self.cache = cache
        self.device = check_feature_device(device)
        self.instruments = instruments
        self.start_time = start_time
        self.end_time = end_time
        self.fetch_orig = fetch_orig
        self.data_loader: DataLoader = build_loader(data_loader)
        self.source = self._build_source(source)
        if init_data:
            self._load_at_once()

    def _load_at_once(self) -> None:
        """Load the data, and raise DataError if it changes meanwhile."""
        if type(self.data_loader).fingerprint is DataLoader.fingerprint:  # it would load it twice
            self._raw_view()
            return
        fingerprint = self.fingerprint()
        self._raw_view()
        if self.fingerprint() != fingerprint:
            raise DataError(
                f"the data changed while {type(self).__name__} loaded it (init_data=True). Load it "
                "again when nothing writes to it."
            )

    def _build_source(self, config: Any) -> Source | None:
        if config is not None:
            return build_source(config)
        if session().provider_uri is None or not self.data_loader.needs_source():
            return None
        source = default_source()
        # Store the default source as an argument, so that a task describes its own data source.
        self._arguments = {**self._arguments, "source": source}
        return source

    # -- data ----------------------------------------------------------------------------------

    def view(self, data_key: str = DK_I, *, groups: Sequence[str] | None = None) -> View:
        """Return the data of a key as tensors, loading and processing it on first use.

        `groups` names the requested groups; others may be missing in the raw view.
        """
        check_key(data_key)
        return self._raw_view(groups)

    def _raw_view(self, groups: Sequence[str] | None = None) -> View:
        if self._raw is None:
            self._raw = self._load(None)
        return self._raw

    def _load(self, columns: Names | None) -> View:
        with (
            use_feature_device(self.device),
            use_feature_cache(self.cache),
            infinity_policy(self._replaces_infinite()),
        ):
            view = self.data_loader.view(
                self.instruments,
                self.start_time,
                self.end_time,
                source=self.source,
                columns=columns,
            )
        if not bool(view.rows.any()):
            raise DataError(f"the data has no rows between {self.start_time} and {self.end_time}.")
        return view

    def _replaces_infinite(self) -> bool:
        """Whether infinite values may be loaded, because processors replace them."""
        return False

    def setup_data(self) -> None:
        """Reload the data for the dates and instruments that are configured now."""
        self._raw = None
        self.view(DK_R)

    def config(
        self,
        *args: Any,
        instruments: Any = None,
        start_time: Any = None,
        end_time: Any = None,
        **kwargs: Any,
    ) -> None:
        """Change instruments or dates (None keeps them), and pass Serializable's options.

        Data that is already loaded is reloaded on next use; fitted processors stay fitted.
        """
        options = {"instruments": instruments, "start_time": start_time, "end_time": end_time}
        changes = {k: v for k, v in options.items() if v is not None}
        for name, value in changes.items():
            setattr(self, name, value)
        self._arguments = {**self._arguments, **changes}
        if changes:
            self._discard_data()
        super().config(*args, **kwargs)

    def _discard_data(self) -> None:
        self._raw = None

    def bind_train_segment(self, start: Any, end: Any) -> None:
        """Set the dataset's train segment, for processors of handlers that the loader reads."""
        if self.data_loader.bind_train_segment(start, end):
            self._discard_data()

    def set_source(self, source: Any) -> None:
        """Replace the data source; fitted processors stay fitted."""
        self.source = build_source(source)
        self._arguments = {**self._arguments, "source": self.source}
        self._discard_data()

    def change_data(self, change: DataChange) -> Self:
        """Return a handler of changed data with the same settings; nothing is loaded or fitted."""
        source = None if self.source is None else change.change_source(self.source)
        return self.with_loader(self.data_loader.change_data(change), source)

    def with_loader(self, data_loader: DataLoader, source: Source | None) -> Self:
        """Return a handler with the same settings that loads its data from another loader.

        Nothing is loaded, and processors are neither shared nor fitted.
        """
        handler = copy_attributes(self)
        handler.data_loader, handler.source, handler.cache = data_loader, source, False
        handler._discard_data()
        return handler

    def check_settings(self) -> None:
        """Raise an error for settings that no data can be loaded with; nothing is loaded."""
        self.data_loader.check_settings(self.instruments, self.source)
        if self.source is None and self.data_loader.needs_source():
            default_source()
        self.check_dates(self.start_time, self.end_time, "the data of the handler")

    def check_fit_windows(self) -> None:
        """Raise an error for dates that processors cannot be fitted on; nothing is loaded.

        The train segment is known by now, see `bind_train_segment`.
        """

    def find_calendar(self) -> pd.DatetimeIndex | None:
        """Return the calendar of the data; None if only loading the data can tell."""
        return self.data_loader.find_calendar(self.source)

    def check_dates(self, start: Any, end: Any, name: str) -> None:
        """Raise DataError if the data is known to have no date from `start` to `end`, inclusive.

        `name`: what has these dates, for the message. Raises ConfigError for what is not a date.
        Nothing is loaded.
        """
        calendar = self.find_calendar()
        dates = pd.DatetimeIndex([]) if calendar is None else calendar
        try:
            rows = date_rows(dates, start, end)
        except DataError as error:
            raise ConfigError(f"{name} ({start}..{end}): {error}") from error
        dates = dates[rows]
        dates = dates[date_rows(dates, self.start_time, self.end_time)]
        if calendar is not None and not len(dates):
            coverage = coverage_dates(calendar[date_rows(calendar, self.start_time, self.end_time)])
            raise DataError(f"{name} ({start}..{end}) has no rows; the data has {coverage}.")

    def get_loaded_view(self) -> View | None:
        """Return the raw data as far as it is loaded; its columns may be only those needed."""
        return self._raw

    def fingerprint(self) -> str:
        """Return a hash of the content of the data that the handler reads."""
        return self.data_loader.fingerprint(self.source)

    def horizon(self, group: str = "label") -> int | None:
        """Return how many calendar rows the label looks ahead; None if the loader does not know."""
        return self.data_loader.horizon(group)

    def frequency(self) -> str | None:
        """Return the frequency of the bars, such as "day" or "30min".

        None if the data is not read from a source of bars (a user's frame).
        """
        return self.data_loader.frequency(self.source)

    def bars_source(self) -> Source | None:
        """Return the source of the bars: the loader's own, else the handler's; None without one."""
        return self.data_loader.bars_source(self.source)

    # -- frames --------------------------------------------------------------------------------

    def fetch(
        self,
        selector: Any = slice(None),
        level: str | int | None = "datetime",
        col_set: str | Sequence[str] = CS_ALL,
        data_key: str = DK_I,
        squeeze: bool = False,
        proc_func: Callable[[pd.DataFrame], pd.DataFrame] | None = None,
    ) -> pd.DataFrame:
        """Return rows and columns as a `(datetime, instrument)` frame of float32.

        `selector` and `level`: a date, a pair or slice of dates (inclusive), or an index, on the
        level "datetime" or "instrument"; for `level=None` anything that `frame.loc` accepts.
        `col_set`: "__all" (one level of columns), "__raw" (groups and columns), a group, or a
        list of groups. `proc_func` is applied to the rows before columns are selected.
        """
        group = None if isinstance(col_set, str) and col_set in (CS_ALL, CS_RAW) else col_set
        groups = [group] if isinstance(group, str) else group
        view = self.view(data_key, groups=None if proc_func is not None else groups)
        if proc_func is None:
            frame = fetch_frame(view, selector, level, col_set)
        else:
            processed_frame = proc_func(fetch_frame(view, selector, level, CS_RAW))
            frame = select_column_set(processed_frame, col_set)
        return squeeze_frame(frame, selector, level) if squeeze else frame

    def get_cols(self, col_set: str | Sequence[str] = CS_ALL, data_key: str = DK_I) -> list[Any]:
        """Return the column names of a column set."""
        return column_set_names(self.view(data_key), col_set)

    def get_range_selector(self, cur_date: Any, periods: int) -> slice:
        """Return the slice of the `periods` trading days that end with `cur_date`."""
        dates = self.view(DK_I).dates
        last = int(dates.get_indexer(pd.DatetimeIndex([cur_date]))[0])
        if last < 0:
            raise DataError(f"{cur_date} is not a date of the data.")
        if last - periods + 1 < 0:
            warnings.warn("`periods` is too large. the first date will be returned.", stacklevel=2)
        return slice(dates[max(0, last - periods + 1)], pd.Timestamp(cur_date))

    def get_range_iterator(
        self, periods: int, min_periods: int | None = None, **fetch: Any
    ) -> Iterator[tuple[pd.Timestamp, pd.DataFrame]]:
        """Yield each date and the frame of its last `periods` days; `fetch` is passed to fetch."""
        dates = self.view(DK_I).dates
        for date in dates[periods if min_periods is None else min_periods :]:
            yield date, self.fetch(self.get_range_selector(date, periods), **fetch)

    def __repr__(self) -> str:
        start, end = self.start_time, self.end_time
        if self._raw is not None:
            span, state = coverage_dates(self._raw.dates), "loaded"
        else:
            span = "all dates" if start is end is None else f"{start or ''}..{end or ''}"
            state = "not loaded"
        return f"{type(self).__name__}({self.instruments}, {span}, {state})"


def check_key(data_key: str) -> None:
    """Raise ConfigError for a data key other than raw, infer and learn."""
    if data_key not in DATA_KEYS:
        raise ConfigError(unknown_name_message("data_key", str(data_key), DATA_KEYS))


class DataHandlerLP(DataHandler):
    """A handler with processors: the keys "raw", "infer" and "learn" are three views.

    `shared_processors` run first. "infer" is the result of `infer_processors`; "learn" is the
    result of `learn_processors`, applied to infer if `process_type` is "append" or to the shared
    result if it is "independent". The views share columns, so three keys cost little more memory
    than one. Each processor is fitted once, on the output of the one before it.

    The fit window is the processor's own, else `fit_start_time..fit_end_time`, else the train
    segment of the dataset that the handler belongs to. An explicit window that reaches beyond the
    train segment is an error unless `allow_wide_fit` is set. `drop_raw` frees the raw data once it
    is processed. Infinite bars, or infinite values in a user's frame, need a ProcessInf before the
    first processor that is fitted. Infinities that a division creates are left to the processors,
    but only ProcessInf may remove an infinite label. A processor is an object,
    `{"_target_": ...}`, `{"class": ..., "kwargs": {...}}`, or the name of a class in
    qtorch.data.processor; pandas processors are adapted.
    """

    PTYPE_I: ClassVar[str] = "independent"
    PTYPE_A: ClassVar[str] = "append"
    IT_FIT_SEQ: ClassVar[str] = "fit_seq"
    IT_FIT_IND: ClassVar[str] = "fit_ind"
    IT_LS: ClassVar[str] = "load_state"

    from_cast: bool = False
    #: Whether the processors are fitted. `is_frozen`: they were restored from a stored state, and
    #: only `setup_data(init_type="fit_seq")` refits them.
    is_fitted: bool = False
    is_learn_fitted: bool = False
    is_frozen: bool = False

    _shared_view: View | None = None
    _infer: View | None = None
    _learn: View | None = None
    _train: DateSpan | None = None
    _is_raw_complete: bool = False

    def __init__(
        self,
        instruments: Any = None,
        start_time: Any = None,
        end_time: Any = None,
        data_loader: Any = None,
        infer_processors: Sequence[Any] = (),
        learn_processors: Sequence[Any] = (),
        shared_processors: Sequence[Any] = (),
        process_type: str = PTYPE_A,
        drop_raw: bool = False,
        *,
        fit_start_time: Any = None,
        fit_end_time: Any = None,
        allow_wide_fit: bool = False,
        init_data: bool = False,
        fetch_orig: bool = True,
        source: Any = None,
        cache: bool | str | Path = False,
        device: str = "cpu",
    ) -> None:
        if process_type not in (self.PTYPE_A, self.PTYPE_I):
            valid_names = (self.PTYPE_A, self.PTYPE_I)
            raise ConfigError(unknown_name_message("process_type", str(process_type), valid_names))
        self.infer_processors = build_processors(infer_processors, "infer_processors")
        self.learn_processors = build_processors(learn_processors, "learn_processors")
        self.shared_processors = build_processors(shared_processors, "shared_processors")
        pipeline.check_infer_processors(self.infer_processors, "infer_processors")
        pipeline.check_infer_processors(self.shared_processors, "shared_processors")
        self.process_type = process_type
        self.drop_raw = drop_raw
        self.fit_start_time = fit_start_time
        self.fit_end_time = fit_end_time
        self.allow_wide_fit = allow_wide_fit
        super().__init__(
            instruments,
            start_time,
            end_time,
            data_loader,
            init_data,
            fetch_orig,
            source=source,
            cache=cache,
            device=device,
        )

    def check_settings(self) -> None:
        super().check_settings()
        names = self.data_loader.names()
        if names is not None:
            is_append = self.process_type == self.PTYPE_A
            inference = [*self.shared_processors, *self.infer_processors]
            pipeline.check_names(self.get_all_processors() if is_append else inference, names)

    def check_fit_windows(self) -> None:
        for processor in self.get_all_processors():
            window = self._processor_window(processor)
            if window is not None:
                self.check_dates(*window, f"the fit window of {type(processor).__name__}")
        calendar = self.find_calendar()
        if calendar is not None:
            self._check_windows(calendar[date_rows(calendar, self.start_time, self.end_time)])

    def get_all_processors(self) -> list[Processor]:
        """Return the shared, infer and learn processors, in this order."""
        return [*self.shared_processors, *self.infer_processors, *self.learn_processors]

    # -- the three views -----------------------------------------------------------------------

    def view(
        self, data_key: str = DataHandler.DK_I, *, groups: Sequence[str] | None = None
    ) -> View:
        check_key(data_key)
        if data_key == DK_R:
            return self._raw_view(groups)
        if self._infer is None:
            self._process_infer()
        if data_key == DK_L and self._learn is None:
            self._process_learn()
        view = self._learn if data_key == DK_L else self._infer
        assert view is not None
        return view

    def _replaces_infinite(self) -> bool:
        lists = [[*self.shared_processors, *self.infer_processors]]
        if self.process_type == self.PTYPE_I:
            lists.append([*self.shared_processors, *self.learn_processors])
        return all(pipeline.replaces_infinite(each) for each in lists)

    def _raw_view(self, groups: Sequence[str] | None = None) -> View:
        if self.drop_raw and self._infer is not None:
            if self._raw is not None and groups and all(g in self._raw.groups for g in groups):
                return self._raw
            raise ConfigError(
                "the raw data was dropped (drop_raw=True keeps only the label); build the handler "
                "with drop_raw=False to access it."
            )
        if self.from_cast:
            raise ConfigError("a handler created by cast(...) has no raw data.")
        if self._raw is not None and not self._is_raw_complete and not self._has_raw_groups(groups):
            self._raw = None
        if self._raw is None:
            self._raw = self._load(None)
            self._is_raw_complete = True
        return self._raw

    def _has_raw_groups(self, groups: Sequence[str] | None) -> bool:
        """Whether the partial raw view holds all columns of these groups."""
        names, raw = self.data_loader.names(), self._raw
        if groups is None or names is None or raw is None:
            return False
        known_groups = [g for g in groups if g in names]
        return all(g in raw.groups and raw.groups[g].names == names[g] for g in known_groups)

    def _process_infer(self) -> None:
        """Load the columns that the processors need, then fit and run the infer processors."""
        names = self.data_loader.names()
        columns = None
        if names is not None:
            needed_columns = self._find_needed_columns(names)
            columns = None if needed_columns == names else needed_columns
        raw = self._raw
        if raw is None:
            raw = self._load(columns)
            self._is_raw_complete = columns is None
        if names is None:
            self._find_needed_columns(column_names(raw))
        fit, window = not self.is_fitted, self._fit_window()
        if fit:
            self._check_windows(raw.calendar)
        shared_view = pipeline.run(raw, self.shared_processors, fit=fit, window=window)
        infer = pipeline.run(shared_view, self.infer_processors, fit=fit, window=window)
        self._raw = _select_label(raw) if self.drop_raw else raw
        self._shared_view, self._infer = shared_view, infer
        self.is_fitted = True

    def _process_learn(self) -> None:
        """Fit and run the learn processors; separate because new data may have no label."""
        base = self._infer if self.process_type == self.PTYPE_A else self._shared_view
        assert base is not None
        fit = not self.is_learn_fitted
        self._learn = pipeline.run(base, self.learn_processors, fit=fit, window=self._fit_window())
        self.is_learn_fitted = True

    def _find_needed_columns(self, names: Names) -> Names:
        """Return the columns that infer and learn depend on; check the processors' names."""
        inference = [*self.shared_processors, *self.infer_processors]
        is_append = self.process_type == self.PTYPE_A
        learning = [*(inference if is_append else self.shared_processors), *self.learn_processors]
        pipeline.check_names(self.get_all_processors() if is_append else inference, names)
        pipeline.warn_about_label_drops(inference, names)
        needed_names = pipeline.find_needed_columns(inference, names)
        if is_append:
            return needed_names
        return pipeline.merge_column_names(
            needed_names, pipeline.find_needed_columns(learning, names), names
        )

    # -- fitting -------------------------------------------------------------------------------

    def bind_train_segment(self, start: Any, end: Any) -> None:
        """Set the dataset's train segment: the default fit window, and the bound of explicit ones.

        Processors that were fitted on another train segment are refitted on next use. Raises
        ConfigError if an explicit window reaches beyond the segment.
        """
        super().bind_train_segment(start, end)
        train = DateSpan(start, end)
        if train == self._train:
            return
        self._train = train
        if self.is_frozen or self.from_cast:
            return
        if self._infer is not None:
            self._check_windows(self._infer.calendar)
        if any(
            p.has_fit_window() and not self._has_explicit_window(p)
            for p in self.get_all_processors()
        ):
            self._discard_views()
            self.is_fitted = self.is_learn_fitted = False

    def _has_explicit_window(self, processor: Processor) -> bool:
        """Whether the processor's fit window is independent of the train segment."""
        has_handler_window = None not in (self.fit_start_time, self.fit_end_time)
        return has_handler_window or pipeline.has_own_window(processor)

    def _fit_window(self) -> DateSpan | None:
        train = self._train
        if train is None and self.fit_start_time is None and self.fit_end_time is None:
            return None
        start, end = train or (None, None)
        return DateSpan(
            start if self.fit_start_time is None else self.fit_start_time,
            end if self.fit_end_time is None else self.fit_end_time,
        )

    def _processor_window(self, processor: Processor) -> DateSpan | None:
        """Return the dates that a processor is fitted on; None without a fit or without dates."""
        if not processor.has_fit_window():
            return None
        if pipeline.has_own_window(processor):
            return DateSpan(processor.fit_start_time, processor.fit_end_time)
        return self._fit_window()

    def _check_windows(self, calendar: pd.DatetimeIndex) -> None:
        if self._train is None:
            return
        for processor in self.get_all_processors():
            window = self._processor_window(processor)
            if window is not None:
                processor_name = type(processor).__name__
                pipeline.check_window(
                    calendar, window, self._train, processor_name, self.allow_wide_fit
                )

    def fit(self) -> None:
        """Fit every processor on the raw data without processing it."""
        for processor in self.get_all_processors():
            pipeline.fit_processor(processor, self._raw_view(), self._fit_window())
        self.is_fitted = self.is_learn_fitted = True

    def fit_process_data(self) -> None:
        """Fit each processor on the output of the one before it."""
        self.process_data(with_fit=True)

    def process_data(self, with_fit: bool = False) -> None:
        """Run the processors again; with `with_fit`, refit them as well."""
        if not with_fit and not self.is_fitted:
            raise NotFittedError(
                "the processors are not fitted; call process_data(with_fit=True) or load a state."
            )
        if with_fit:
            self.is_fitted = self.is_learn_fitted = False
        self._discard_views()
        self._process_infer()

    def setup_data(self, init_type: str = IT_FIT_SEQ) -> None:
        """Reload and process the data.

        `init_type`: "fit_seq" fits each processor on the output of the one before, "fit_ind" fits
        all on the raw data, "load_state" keeps the fitted processors.
        """
        valid_names = (self.IT_FIT_SEQ, self.IT_FIT_IND, self.IT_LS)
        if init_type not in valid_names:
            raise ConfigError(unknown_name_message("init_type", str(init_type), valid_names))
        self._discard_data()
        self.is_frozen = init_type == self.IT_LS
        if init_type == self.IT_FIT_IND:
            self.fit()
        self.process_data(with_fit=init_type == self.IT_FIT_SEQ)

    def config(
        self, *args: Any, processor_kwargs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Change DataHandler's options; `processor_kwargs` go to every processor's `config`."""
        if processor_kwargs:
            for processor in self.get_all_processors():
                processor.config(**processor_kwargs)
            lists = ("infer_processors", "learn_processors", "shared_processors")
            processors = {n: getattr(self, n) for n in lists if getattr(self, n)}
            self._arguments = {**self._arguments, **processors}
        super().config(*args, **kwargs)

    def with_loader(self, data_loader: DataLoader, source: Source | None) -> Self:
        handler = super().with_loader(data_loader, source)
        for name in ("shared_processors", "infer_processors", "learn_processors"):
            setattr(handler, name, [_copy_processor(p) for p in getattr(self, name)])
        handler.is_fitted = handler.is_learn_fitted = handler.is_frozen = False
        handler.drop_raw = False
        return handler

    def _discard_data(self) -> None:
        super()._discard_data()
        self._is_raw_complete = False
        self._discard_views()

    def _discard_views(self) -> None:
        self._shared_view = self._infer = self._learn = None

    # -- storage -------------------------------------------------------------------------------

    def get_fitted_state(self) -> State:
        """Return the fitted parameters of the processors as plain data and tensors."""
        first_of_learn = len(self.get_all_processors()) - len(self.learn_processors)
        states: list[dict[str, Any] | None] = []
        tensors = {}
        for k, processor in enumerate(self.get_all_processors()):
            is_fitted = self.is_fitted if k < first_of_learn else self.is_learn_fitted
            state = processor.get_fitted_state() if is_fitted else None
            states.append(None if state is None else state.config)
            for name, tensor in ({} if state is None else state.tensors).items():
                tensors[f"processors.{k}.{name}"] = tensor
        flags = {"fitted": self.is_fitted, "learn_fitted": self.is_learn_fitted}
        return State({**flags, "processors": states}, tensors)

    def load_fitted_state(self, state: State) -> None:
        """Load the fitted parameters of another handler's processors; they are not refitted.

        Raises ConfigError if that handler had a different number of processors.
        """
        states, num_processors = state.config["processors"], len(self.get_all_processors())
        if len(states) != num_processors:
            raise ConfigError(
                f"the state has {len(states)} processors, but this handler has {num_processors}."
            )
        self._discard_views()
        for k, processor_config in enumerate(states):
            if processor_config is None:
                continue
            prefix = f"processors.{k}."
            tensors = {
                n[len(prefix) :]: t for n, t in state.tensors.items() if n.startswith(prefix)
            }
            self.get_all_processors()[k].load_fitted_state(State(processor_config, tensors))
        self.is_fitted = self.is_frozen = bool(state.config["fitted"])
        self.is_learn_fitted = bool(state.config["learn_fitted"])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.is_frozen = self.is_fitted

    @classmethod
    def cast(cls, handler: DataHandlerLP) -> DataHandlerLP:
        """Convert to a plain DataHandlerLP that holds only the processed data.

        This shares the results of a user's subclass without its code:
        `DataHandlerLP.cast(h).to_pickle(path, dump_all=True)`.
        """
        infer, learn = handler.view(cls.DK_I), handler.view(cls.DK_L)
        new = DataHandlerLP(data_loader=StaticDataLoader(None))
        for name in ("instruments", "start_time", "end_time", "fetch_orig", "drop_raw"):
            setattr(new, name, getattr(handler, name))
        new.from_cast = new.is_fitted = new.is_learn_fitted = new.is_frozen = True
        new._infer, new._learn = infer, learn
        return new

    @classmethod
    def from_df(
        cls, df: pd.DataFrame, *, label: str | Sequence[str] | None = None, **options: Any
    ) -> Self:
        """Build a handler from a `(datetime, instrument)` frame.

        Two-level columns are `(group, column)` as in Qlib: `feature` and `label`. For a frame with
        one level, `label` names the label's columns and all others are features. Further `options`
        are the constructor's (infer_processors, learn_processors, ...).
        """
        if label is None:
            return cls(data_loader=StaticDataLoader(df), **options)
        df = as_pandas(df)
        names = [label] if isinstance(label, str) else list(label)
        if df.columns.nlevels != 1:
            raise ConfigError("label=... requires a frame whose columns have one level.")
        for name in names:
            if name not in df.columns:
                raise ConfigError(unknown_name_message("column", name, map(str, df.columns)))
        df = index_frame(df)
        parts = {"feature": df.drop(columns=names), "label": df[names]}
        return cls(data_loader=StaticDataLoader(parts), **options)


def _copy_processor(processor: Processor) -> Processor:
    """Return a copy that shares no fitted state; a pickle would leave out some attributes."""
    other = copy_attributes(processor)
    vars(other).update(copy.deepcopy(vars(processor)))
    return other


def _select_label(view: View) -> View | None:
    """Return only the raw label, which evaluation needs; None if there is no label."""
    groups = {g: c for g, c in view.groups.items() if g == "label"}
    return View(groups, view.rows, view.history) if groups else None
