"""The handler of raw data: loads once, hands out views and frames."""

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
from qtorch.core.trust import trusted_type
from qtorch.data.data_loader import DataLoader
from qtorch.data.feature_cache import caching
from qtorch.data.fetch import CS_ALL, CS_RAW, column_names, fetch_frame, squeezed
from qtorch.data.infinite import infinities_are_mended
from qtorch.data.loader import build_loader
from qtorch.data.processor.base import Names
from qtorch.data.provider import build_source, default_source
from qtorch.data.source.base import Source
from qtorch.data.view import View

DK_R, DK_I, DK_L = "raw", "infer", "learn"
DATA_KEYS = (DK_R, DK_I, DK_L)


@trusted_type
class DataHandler(Configured, Serializable):
    """Loads raw data when it is first asked for, and hands it out by dates and columns.

    `instruments`: a universe's name, a list, or None for all. Dates are inclusive. `data_loader`:
    a loader, its configuration, or a DataFrame. `source`: where bars come from (a Source, its
    configuration, a folder in Qlib's layout); None takes that of `qtorch.init`. `cache` keeps the
    loader's features on disk for whoever asks for the same (True: in QTORCH_CACHE; a path: there;
    see qtorch.data.feature_cache). `init_data=True`
    loads at once (Qlib's default). `fetch_orig` is taken for Qlib's sake: what is fetched is
    always the caller's own copy. Infinite bars, or infinite values of one's own frame, are a
    DataError that says where they are.

    `view(data_key)` gives tensors (`View`), `fetch` DataFrames. Answers to
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
        self.source = self._source_of(source)
        if init_data:
            self._raw_view()

    def _source_of(self, given: Any) -> Source | None:
        if given is not None:
            return build_source(given)
        if session().provider_uri is None or not self.data_loader.needs_source():
            return None
        source = default_source()
        # A task carries its data source, also where the default gave it.
        self._arguments = {**self._arguments, "source": source}
        return source

    # -- data ----------------------------------------------------------------------------------

    def view(self, data_key: str = DK_I, *, groups: Sequence[str] | None = None) -> View:
        """The data of a key as tensors; loaded and processed now if it was not.

        `groups` says which are wanted; others may be missing in the raw view.
        """
        check_key(data_key)
        return self._raw_view(groups)

    def _raw_view(self, groups: Sequence[str] | None = None) -> View:
        if self._raw is None:
            self._raw = self._load(None)
        return self._raw

    def _load(self, columns: Names | None) -> View:
        with caching(self.cache), infinities_are_mended(self._mends_infinite()):
            view = self.data_loader.view(
                self.instruments,
                self.start_time,
                self.end_time,
                source=self.source,
                columns=columns,
            )
        if not bool(view.rows.any()):
            raise DataError(f"there is no row between {self.start_time} and {self.end_time}.")
        return view

    def _mends_infinite(self) -> bool:
        """Whether infinite values may be loaded, because they do not stay."""
        return False

    def setup_data(self) -> None:
        """Load the data again, for the dates and instruments as they are configured now."""
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
        """Other instruments or dates (None: as they are), and Serializable's options.

        Data that is already loaded is loaded again at its next use; what processors have learnt
        stays.
        """
        given = {"instruments": instruments, "start_time": start_time, "end_time": end_time}
        changed = {k: v for k, v in given.items() if v is not None}
        for name, value in changed.items():
            setattr(self, name, value)
        self._arguments = {**self._arguments, **changed}
        if changed:
            self._forget()
        super().config(dump_all, exclude, include, recursive)

    def _forget(self) -> None:
        self._raw = None

    def set_source(self, source: Any) -> None:
        """Put the handler on other data; what processors have learnt stays."""
        self.source = build_source(source)
        self._arguments = {**self._arguments, "source": self.source}
        self._forget()

    def fingerprint(self) -> str:
        """A hash of the content of the data that the handler reads."""
        return self.data_loader.fingerprint(self.source)

    def horizon(self, group: str = "label") -> int | None:
        """Calendar rows that the label looks ahead; None where the loader does not know."""
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
        """Rows and columns as a `(datetime, instrument)` frame of float32.

        `selector` and `level`: a date, a pair or slice of dates (inclusive), an index; of the
        level "datetime" or "instrument", or for `level=None` anything that `frame.loc` takes.
        `col_set`: "__all" (one level of columns), "__raw" (groups and columns), a group, or a
        list of groups. `proc_func` is applied to the rows before columns are chosen.
        """
        wanted = None if isinstance(col_set, str) and col_set in (CS_ALL, CS_RAW) else col_set
        groups = [wanted] if isinstance(wanted, str) else wanted
        view = self.view(data_key, groups=None if proc_func is not None else groups)
        if proc_func is None:
            frame = fetch_frame(view, selector, level, col_set)
        else:
            whole = proc_func(fetch_frame(view, selector, level, CS_RAW))
            frame = _of_columns(whole, col_set)
        return squeezed(frame, selector, level) if squeeze else frame

    def get_cols(self, col_set: str | Sequence[str] = CS_ALL, data_key: str = DK_I) -> list[Any]:
        """The names of the columns of a column set."""
        return column_names(self.view(data_key), col_set)

    def get_range_selector(self, cur_date: Any, periods: int) -> slice:
        """The slice of the `periods` trading days that end with `cur_date`."""
        view = self.view(DK_I)
        dates = view.calendar[view.rows.any(1).cpu().numpy()]
        last = int(dates.get_indexer(pd.DatetimeIndex([cur_date]))[0])
        if last < 0:
            raise DataError(f"{cur_date} is no day of the data.")
        if last - periods + 1 < 0:
            warnings.warn("`periods` is too large. the first date will be returned.", stacklevel=2)
        return slice(dates[max(0, last - periods + 1)], pd.Timestamp(cur_date))

    def get_range_iterator(
        self, periods: int, min_periods: int | None = None, **fetch: Any
    ) -> Iterator[tuple[pd.Timestamp, pd.DataFrame]]:
        """Each date with the frame of its last `periods` days; further arguments are fetch's."""
        view = self.view(DK_I)
        dates = view.calendar[view.rows.any(1).cpu().numpy()]
        for date in dates[periods if min_periods is None else min_periods :]:
            yield date, self.fetch(self.get_range_selector(date, periods), **fetch)

    def __repr__(self) -> str:
        said = f"{self.instruments}, {self.start_time}..{self.end_time}"
        return f"{type(self).__name__}({said}, {'loaded' if self._raw else 'not loaded'})"


def check_key(data_key: str) -> None:
    """Refuse a data key that is none of raw, infer and learn."""
    if data_key not in DATA_KEYS:
        raise ConfigError(unknown_name("data_key", str(data_key), DATA_KEYS))


def _of_columns(frame: pd.DataFrame, col_set: str | Sequence[str]) -> pd.DataFrame:
    """The column set of a frame that a user's function gave."""
    if frame.columns.nlevels == 1 or col_set == CS_RAW:
        return frame
    if col_set == CS_ALL:
        return frame.droplevel(0, axis=1)
    chosen: pd.DataFrame = frame[col_set if isinstance(col_set, str) else list(col_set)]
    return chosen
