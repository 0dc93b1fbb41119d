"""The handler of raw data: it loads data once and returns it as views and frames."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd

from qtorch.core.configured import Configured
from qtorch.core.errors import ConfigError, DataError, unknown_name
from qtorch.core.serial import Serializable
from qtorch.core.session import session
from qtorch.core.trust import trust_subclasses
from qtorch.data.data_loader import DataLoader
from qtorch.data.feature_cache import use_feature_cache
from qtorch.data.fetch import CS_ALL, CS_RAW, column_names, fetch_frame, squeeze_frame
from qtorch.data.infinite import infinity_policy
from qtorch.data.loader import build_loader
from qtorch.data.processor.base import Names
from qtorch.data.provider import build_source, default_source
from qtorch.data.source.base import Source
from qtorch.data.view import View

DK_R, DK_I, DK_L = "raw", "infer", "learn"
DATA_KEYS = (DK_R, DK_I, DK_L)


@trust_subclasses
class DataHandler(Configured, Serializable):
    """Load raw data on first use, and return it by dates and columns.

    `instruments`: a universe's name, a list, or None for all. Dates are inclusive. `data_loader`:
    a loader, its configuration, or a DataFrame. `source`: the source of the bars (a Source, its
    configuration, or a folder in Qlib's layout); None uses that of `qtorch.init`. `cache` stores
    the loader's features on disk and shares them with other tasks (True: in QTORCH_CACHE; or a
    path; see qtorch.data.feature_cache). `init_data=True` loads immediately (Qlib's default).
    `fetch_orig` exists for compatibility with Qlib: fetched frames are always copies. Infinite
    bars, or infinite values in a user's frame, raise a DataError with their location.

    `view(data_key)` returns tensors (`View`), `fetch` DataFrames. Answers to
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
    ) -> None:
        self.cache = cache
        self.instruments = instruments
        self.start_time = start_time
        self.end_time = end_time
        self.fetch_orig = fetch_orig
        self.data_loader: DataLoader = build_loader(data_loader)
        self.source = self._build_source(source)
        if init_data:
            self._raw_view()

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
        with use_feature_cache(self.cache), infinity_policy(self._replaces_infinite()):
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
        dump_all: bool | None = None,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
        recursive: bool = False,
        *,
        instruments: Any = None,
        start_time: Any = None,
        end_time: Any = None,
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
        super().config(dump_all, exclude, include, recursive)

    def _discard_data(self) -> None:
        self._raw = None

    def set_source(self, source: Any) -> None:
        """Replace the data source; fitted processors stay fitted."""
        self.source = build_source(source)
        self._arguments = {**self._arguments, "source": self.source}
        self._discard_data()

    def fingerprint(self) -> str:
        """Return a hash of the content of the data that the handler reads."""
        return self.data_loader.fingerprint(self.source)

    def horizon(self, group: str = "label") -> int | None:
        """Return how many calendar rows the label looks ahead; None if the loader does not know."""
        return self.data_loader.horizon(group)

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
            frame = _select_columns(processed_frame, col_set)
        return squeeze_frame(frame, selector, level) if squeeze else frame

    def get_cols(self, col_set: str | Sequence[str] = CS_ALL, data_key: str = DK_I) -> list[Any]:
        """Return the column names of a column set."""
        return column_names(self.view(data_key), col_set)

    def get_range_selector(self, cur_date: Any, periods: int) -> slice:
        """Return the slice of the `periods` trading days that end with `cur_date`."""
        view = self.view(DK_I)
        dates = view.calendar[view.rows.any(1).cpu().numpy()]
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
        view = self.view(DK_I)
        dates = view.calendar[view.rows.any(1).cpu().numpy()]
        for date in dates[periods if min_periods is None else min_periods :]:
            yield date, self.fetch(self.get_range_selector(date, periods), **fetch)

    def __repr__(self) -> str:
        span = f"{self.instruments}, {self.start_time}..{self.end_time}"
        return f"{type(self).__name__}({span}, {'loaded' if self._raw else 'not loaded'})"


def check_key(data_key: str) -> None:
    """Raise ConfigError for a data key other than raw, infer and learn."""
    if data_key not in DATA_KEYS:
        raise ConfigError(unknown_name("data_key", str(data_key), DATA_KEYS))


def _select_columns(frame: pd.DataFrame, col_set: str | Sequence[str]) -> pd.DataFrame:
    """Select a column set from a frame that a user's function returned."""
    if frame.columns.nlevels == 1 or col_set == CS_RAW:
        return frame
    if col_set == CS_ALL:
        return frame.droplevel(0, axis=1)
    selection: pd.DataFrame = frame[col_set if isinstance(col_set, str) else list(col_set)]
    return selection
