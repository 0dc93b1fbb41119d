"""Sources that hold their bars in memory: a user's own DataFrame or Panel."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from qtorch.core.errors import DataError, unknown_name
from qtorch.data.panel import Panel
from qtorch.data.source.base import Bars, Membership, Source, Spans, frequency


class PanelSource(Source):
    """Base of sources of one frequency whose bars fit in memory.

    A subclass implements `panel()` (kept by it, read only) and, for universes beside `all`,
    `memberships()`; `freq` is its frequency.
    """

    freq: str = "day"

    @abstractmethod
    def panel(self) -> Panel:
        """All bars; instruments sorted."""

    def memberships(self) -> Mapping[str, Membership]:
        """The universes; `all` holds each instrument from its first to its last stored day."""
        return {"all": span_membership(self.panel())}

    def read_calendar(self, freq: str) -> pd.DatetimeIndex:
        self._check(freq)
        return self.panel().calendar

    def fields(self, freq: str = "day") -> tuple[str, ...]:
        self._check(freq)
        return self.panel().fields

    def universes(self) -> tuple[str, ...]:
        return tuple(sorted(self.memberships()))

    def read_membership(self, universe: str) -> Membership:
        return self.memberships()[universe]

    def stored_instruments(self) -> frozenset[str]:
        return frozenset(self.panel().instruments)

    def read_bars(
        self, instruments: Sequence[str], fields: Sequence[str], freq: str, rows: slice
    ) -> Bars:
        self._check(freq)
        panel = self.panel()
        values, spans = panel.values.permute(2, 0, 1)[:, rows], panel.spans
        chosen = [panel.position(f) for f in fields]
        if chosen != list(range(len(panel.fields))):
            values = values[torch.tensor(chosen, dtype=torch.int64)]
        if list(instruments) != list(panel.instruments):
            columns = torch.from_numpy(panel.instruments.get_indexer(pd.Index(instruments)))
            values, spans = values[:, :, columns], spans[columns]
        return Bars(values, spans - rows.start)

    def fingerprint(self) -> str:
        """A hash of the bars and of the universes."""
        digest = hashlib.sha256(self.panel().fingerprint().encode())
        for name, members in sorted(self.memberships().items()):
            digest.update(f"{name}\n".encode())
            for instrument, spans in sorted(members.items()):
                digest.update(f"{instrument}{[(a.value, b.value) for a, b in spans]}".encode())
        return digest.hexdigest()[:32]

    def _check(self, freq: str) -> None:
        if frequency(freq) != frequency(self.freq):
            raise DataError(unknown_name("frequency", freq, [self.freq]))


class FrameSource(PanelSource):
    """A user's own bars: a `(datetime, instrument)` DataFrame of numeric columns, or a Panel.

    Column names are the fields (`$close` and `close` are the same). `universes` maps a name to a
    list of instruments or to `{instrument: [(start, end), ...]}`; `all` is there without it: each
    instrument from its first to its last row. A date between them that the frame lacks for an
    instrument is a suspended day, NaN. A Panel's mask, where it says less, is the universe
    `members`.

    Raises DataError for a frame that `Panel.from_frame` refuses.
    """

    def __init__(
        self,
        frame: pd.DataFrame | Panel,
        *,
        universes: Mapping[str, Sequence[str] | Mapping[str, Any]] | None = None,
        freq: str = "day",
    ) -> None:
        self.freq = frequency(freq)
        given = frame if isinstance(frame, Panel) else Panel.from_frame(frame)
        self._panel = sorted_panel(given)
        self._memberships: dict[str, Membership] = {"all": span_membership(self._panel)}
        if isinstance(frame, Panel):
            members = mask_membership(self._panel)
            if members != self._memberships["all"]:
                self._memberships["members"] = members
        for name, listed in (universes or {}).items():
            self._memberships[name] = checked_membership(name, listed, self._panel)

    def panel(self) -> Panel:
        return self._panel

    def memberships(self) -> Mapping[str, Membership]:
        return self._memberships


def as_source(data: Source | Panel | pd.DataFrame) -> Source:
    """A source of what is a source already, a Panel, or a `(datetime, instrument)` DataFrame."""
    if isinstance(data, Source):
        return data
    if isinstance(data, Panel | pd.DataFrame):
        return FrameSource(data)
    raise DataError(f"expected a Source, a Panel or a DataFrame, got {type(data).__name__}.")


def sorted_panel(panel: Panel) -> Panel:
    """The panel with fields without `$` and instruments in ascending order."""
    fields = [f.lstrip("$") for f in panel.fields]
    order = np.argsort(panel.instruments.to_numpy(dtype=object), kind="stable")
    values, mask, spans = panel.values.cpu(), panel.mask.cpu(), panel.spans.cpu()
    if (order != np.arange(len(order))).any():
        chosen = torch.from_numpy(order)
        values = values.permute(2, 0, 1)[:, :, chosen].permute(1, 2, 0)
        mask, spans = mask[:, chosen], spans[chosen]
    names = panel.instruments[order]
    return Panel(values, panel.calendar, names, fields, mask=mask, spans=spans)


def span_membership(panel: Panel) -> Membership:
    """Each instrument from its first to its last stored day."""
    dates = panel.calendar
    return {
        name: [(dates[first], dates[last])]
        for name, (first, last) in zip(panel.instruments, panel.spans.tolist(), strict=True)
        if last >= first
    }


def mask_membership(panel: Panel) -> Membership:
    """The panel's mask as spans of dates."""
    edge = np.zeros((1, panel.shape[1]), dtype=np.int8)
    change = np.diff(panel.mask.cpu().numpy().astype(np.int8), axis=0, prepend=edge, append=edge)
    columns, starts = (a.tolist() for a in np.nonzero((change == 1).T))
    stops = np.nonzero((change == -1).T)[1].tolist()
    membership: Membership = {}
    for column, first, stop in zip(columns, starts, stops, strict=True):
        spans = membership.setdefault(panel.instruments[column], [])
        spans.append((panel.calendar[first], panel.calendar[stop - 1]))
    return membership


def checked_membership(
    universe: str, listed: Sequence[str] | Mapping[str, Any], panel: Panel
) -> Membership:
    """A user's universe as spans within the calendar; each instrument must be in the panel."""
    known = set(panel.instruments)
    always: Spans = [(panel.calendar[0], panel.calendar[-1])]
    given = listed if isinstance(listed, Mapping) else dict.fromkeys(listed, always)
    for name in given:
        if name not in known:
            raise DataError(f"universe {universe!r}: {unknown_name('instrument', name, known)}")
    start, end = always[0]
    return {
        str(name): [
            (max(pd.Timestamp(first), start), min(pd.Timestamp(last), end)) for first, last in spans
        ]
        for name, spans in given.items()
    }
