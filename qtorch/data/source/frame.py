"""Sources that hold their bars in memory, such as a DataFrame or a Panel."""

from __future__ import annotations

import hashlib
import logging
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import torch

from qtorch.core.dates import (
    detect_frequency,
    frequency,
    is_frequency,
    is_intraday,
    parse_span_date,
)
from qtorch.core.errors import ConfigError, DataError, join_names, unknown_name_message
from qtorch.core.instantiate import init_instance_by_config, resolve_config
from qtorch.core.session import session
from qtorch.core.tables import as_pandas, is_frame, not_text_message
from qtorch.data.panel.column_names import describe_names, name_fields
from qtorch.data.panel.frames import ReadOptions, index_frame
from qtorch.data.panel.panel import Panel, coverage_dates, require_numeric
from qtorch.data.source.adjusted import adjust_prices, select_adjusted_close, warn_raw_prices
from qtorch.data.source.base import Bars, Membership, Source
from qtorch.data.source.qlib import ANY_FREQUENCY, QlibSource

logger = logging.getLogger(__name__)

Universes: TypeAlias = Mapping[str, Sequence[str] | Mapping[str, Any]]
"""By name: a list of instruments, or `{instrument: [(start, end), ...]}`."""


class PanelSource(Source):
    """Base class of sources that have one frequency and whose bars fit in memory.

    A subclass implements `panel()`, which should cache its result (it is read only), and
    overrides `memberships()` if it has universes other than `all`. `freq` is its frequency; None
    is detected from the times of the bars.
    """

    _detected_freq: str | None = None

    @abstractmethod
    def panel(self) -> Panel:
        """Return all bars, with sorted instruments."""

    def memberships(self) -> Mapping[str, Membership]:
        """Return the universes; `all` has each instrument from its first to its last stored day."""
        return {"all": span_membership(self.panel())}

    def frequencies(self) -> tuple[str, ...]:
        if self.freq is not None:
            return (frequency(self.freq),)
        if self._detected_freq is None:
            self._detected_freq = detect_frequency(self.panel().calendar)
        return (self._detected_freq,)

    def read_calendar(self, freq: str) -> pd.DatetimeIndex:
        self._check_frequency(freq)
        return _check_bars(freq, self.panel().calendar)

    def fields(self, freq: str | None = None) -> tuple[str, ...]:
        self._check_frequency(self.resolve_frequency(freq))
        return self.panel().fields

    def universes(self) -> tuple[str, ...]:
        return tuple(sorted(self.memberships()))

    def read_membership(self, universe: str) -> Membership:
        return self.memberships()[universe]

    def instrument_names(self) -> frozenset[str]:
        return frozenset(self.panel().instruments)

    def read_bars(
        self, instruments: Sequence[str], fields: Sequence[str], freq: str, rows: slice
    ) -> Bars:
        self._check_frequency(freq)
        panel = self.panel()
        values, spans = panel.values.permute(2, 0, 1)[:, rows], panel.spans
        positions = [panel.position(f) for f in fields]
        if positions != list(range(len(panel.fields))):
            values = values[torch.tensor(positions, dtype=torch.int64)]
        if list(instruments) != list(panel.instruments):
            columns = torch.from_numpy(panel.instruments.get_indexer(pd.Index(instruments)))
            values, spans = values[:, :, columns], spans[columns]
        return Bars(values, spans - rows.start)

    def fingerprint(self) -> str:
        """Return a hash of the bars and of the universes."""
        digest = hashlib.sha256(self.panel().fingerprint().encode())
        for name, members in sorted(self.memberships().items()):
            digest.update(f"{name}\n".encode())
            for instrument, spans in sorted(members.items()):
                digest.update(f"{instrument}{[(a.value, b.value) for a, b in spans]}".encode())
        return digest.hexdigest()[:32]

    def _check_frequency(self, freq: str) -> None:
        if frequency(freq) not in self.frequencies():
            raise DataError(unknown_name_message("frequency", freq, self.frequencies()))


def _check_bars(freq: str, calendar: pd.DatetimeIndex) -> pd.DatetimeIndex:
    """Return the calendar; raise DataError if its bars within a day are called daily or longer."""
    if frequency(freq).endswith("min") or not is_intraday(calendar):
        return calendar
    raise DataError(
        f"freq={freq!r}, but several bars have the same date: they look like "
        f"{detect_frequency(calendar)!r}. Pass that frequency, or leave out freq to detect it."
    )


class FrameSource(PanelSource):
    """Bars from a `(datetime, instrument)` DataFrame of numeric columns, or from a Panel.

    Dates and instruments are index levels or columns with a usual spelling (`Date`, `ticker`, ...).
    The other columns are the fields (`$close`, `close` and `Close` are the same). Frames of polars
    and of other libraries that Arrow can read are converted. `date_format` and `timezone`: see
    `qtorch.core.dates.parse_dates`. `adjust` names the column of the adjusted closes, by which all
    prices are scaled, as in TableSource. `universes` maps a name to a list of instruments or to
    `{instrument: [(start, end), ...]}`. The universe `all` always exists and has each instrument
    from its first to its last row. A date between the two without a row for the instrument is a
    suspended day: its values are NaN. If a Panel's mask is narrower than `all`, it becomes the
    universe `members`. `freq` is the frequency of the bars, such as "30min"; None detects it.

    Raises DataError for a frame that `Panel.from_frame` rejects, and for what is no frame.
    """

    def __init__(
        self,
        frame: pd.DataFrame | Panel | Any,
        *,
        universes: Universes | None = None,
        freq: str | None = None,
        date_format: str | None = None,
        timezone: str | None = None,
        adjust: str | None = None,
    ) -> None:
        options = ReadOptions(date_format, timezone)
        if isinstance(frame, Panel) and adjust is not None:
            raise ConfigError(f"adjust={adjust!r} needs a DataFrame; pass panel.to_frame().")
        panel = frame if isinstance(frame, Panel) else read_bar_frame(frame, options, adjust)
        self._panel = sort_panel(panel)
        self._memberships: dict[str, Membership] = {"all": span_membership(self._panel)}
        if isinstance(frame, Panel):
            members = mask_membership(self._panel)
            if members != self._memberships["all"]:
                self._memberships["members"] = members
        self._memberships |= Memberships(universes or {}, self._panel)
        self.freq = None if freq is None else frequency(freq)
        self.freq = self.frequencies()[0]
        _check_bars(self.freq, self._panel.calendar)

    @property
    def knows_names(self) -> bool:
        return True

    def __repr__(self) -> str:
        panel = self._panel
        d, n, _ = panel.shape
        size = f"{d} dates {coverage_dates(panel.calendar)}, {n} instruments"
        return f"{type(self).__name__}({size}, fields {join_names(panel.fields)})"

    def panel(self) -> Panel:
        return self._panel

    def memberships(self) -> Mapping[str, Membership]:
        return self._memberships


def as_source(data: Source | Panel | pd.DataFrame) -> Source:
    """Convert a Panel or a frame, as in FrameSource, to a source; return a source as it is."""
    if isinstance(data, Source):
        return data
    if isinstance(data, Panel) or is_frame(data):
        return FrameSource(data)
    raise DataError(f"expected a Source, a Panel or a DataFrame, got {type(data).__name__}.")


def read_bar_frame(frame: Any, options: ReadOptions, adjust: str | None = None) -> Panel:
    """Convert a user's frame of bars to a panel, with the usual names of its fields.

    `adjust` names the column of the adjusted closes, see TableSource.
    """
    frame = index_frame(as_pandas(frame), options)
    if frame.columns.nlevels > 1:
        if adjust is not None:
            raise DataError(
                f"adjust={adjust!r} needs a frame whose columns have one level, such as 'close'; "
                f"got {frame.columns.nlevels} levels."
            )
        return Panel.from_frame(frame)
    frame = require_numeric(frame)
    columns = [str(column) for column in frame.columns]
    fields = name_fields(columns)
    if adjust is not None:
        fields = select_adjusted_close(fields, adjust, columns, "column")
    names = {column: field for field, column in fields.items()}
    frame = frame.set_axis([names[column] for column in columns], axis=1)
    if text := describe_names(fields):
        logger.info("columns read under their usual names: %s", text)
    panel = Panel.from_frame(frame if adjust is None else adjust_prices(frame))
    warn_raw_prices(panel, fields, "the frame")
    return panel


def sort_panel(panel: Panel) -> Panel:
    """Sort a panel by instrument and remove `$` from its field names."""
    panel = panel.to("cpu").replace(fields=[f.lstrip("$") for f in panel.fields])
    names = sorted(panel.instruments)
    return panel if names == list(panel.instruments) else panel.select(instruments=names)


def span_membership(panel: Panel) -> Membership:
    """Return a membership of each instrument from its first to its last stored day."""
    dates = panel.calendar
    return {
        name: [(dates[first], dates[last])]
        for name, (first, last) in zip(panel.instruments, panel.spans.tolist(), strict=True)
        if last >= first
    }


def mask_membership(panel: Panel) -> Membership:
    """Convert the panel's mask to spans of dates."""
    edge = np.zeros((1, panel.shape[1]), dtype=np.int8)
    change = np.diff(panel.mask.cpu().numpy().astype(np.int8), axis=0, prepend=edge, append=edge)
    columns, starts = (a.tolist() for a in np.nonzero((change == 1).T))
    stops = np.nonzero((change == -1).T)[1].tolist()
    membership: Membership = {}
    for column, first, stop in zip(columns, starts, stops, strict=True):
        spans = membership.setdefault(panel.instruments[column], [])
        spans.append((panel.calendar[first], panel.calendar[stop - 1]))
    return membership


class Memberships(Mapping[str, Membership]):
    """A user's universes as spans within the calendar of a panel; each is built on first use.

    An instrument that is not in the panel raises DataError; with `skip_unknown` it is left out with
    a warning, as long as others remain.
    """

    def __init__(self, universes: Universes, panel: Panel, *, skip_unknown: bool = False) -> None:
        self._universes = universes
        self._panel = panel
        self._skip_unknown = skip_unknown
        self._memberships: dict[str, Membership] = {}

    def __getitem__(self, universe: str) -> Membership:
        if universe not in self._memberships:
            self._memberships[universe] = self._build(universe, self._universes[universe])
        return self._memberships[universe]

    def __iter__(self) -> Iterator[str]:
        return iter(self._universes)

    def __len__(self) -> int:
        return len(self._universes)

    def _build(self, universe: str, members: Sequence[str] | Mapping[str, Any]) -> Membership:
        if not len(self._panel.calendar):
            return {}
        stored_names = set(self._panel.instruments)
        start, end = self._panel.calendar[0], self._panel.calendar[-1]
        spans = (
            members if isinstance(members, Mapping) else {name: [(start, end)] for name in members}
        )
        unknown = [name for name in spans if str(name) not in stored_names]
        if unknown and (not self._skip_unknown or len(unknown) == len(spans)):
            message = (
                unknown_name_message("instrument", unknown[0], stored_names)
                if isinstance(unknown[0], str)
                else not_text_message(unknown[0], "instrument")
            )
            raise DataError(f"universe {universe!r}: {message}")
        if unknown:
            logger.warning(
                "universe %r: %d of %d instruments have no bars and are left out: %s",
                universe,
                len(unknown),
                len(spans),
                join_names([str(name) for name in unknown]),
            )
        return {
            str(name): [
                (
                    max(parse_span_date(first, is_end=False), start),
                    min(parse_span_date(last, is_end=True), end),
                )
                for first, last in each
            ]
            for name, each in spans.items()
            if str(name) in stored_names
        }


def build_source(config: Any) -> Source:
    """Build a source from a Source, a configuration, a frame, a Panel, or Qlib's folders.

    The latter are one folder, or `{frequency: folder}`.
    """
    config = resolve_config(config)
    if isinstance(config, Mapping) and not _is_folder_by_frequency(config):
        source = init_instance_by_config(config, "qtorch.data.source", accept_types=Source)
        return as_source(source)
    if isinstance(config, str | Mapping) or hasattr(config, "__fspath__"):
        return QlibSource(config)
    return as_source(config)


def _is_folder_by_frequency(config: Mapping[str, Any]) -> bool:
    """Whether a mapping is Qlib's `{frequency: folder}` and not a configuration."""
    return bool(config) and all(key == ANY_FREQUENCY or is_frequency(key) for key in config)


def default_source() -> Source:
    """Return the source of `qtorch.init(provider_uri=...)`; raise ConfigError if none is set."""
    if session().provider_uri is None:
        raise ConfigError(
            "no data source: pass source=... to the handler (QlibSource, TableSource, "
            "SyntheticSource), or call qtorch.init(provider_uri='/path/to/qlib_data') first."
        )
    return build_source(session().provider_uri)
