"""Read and validate the signal of a strategy, and arrange its scores by bar for the backtest."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from qtorch.core.errors import ConfigError, DataError
from qtorch.core.instantiate import init_instance_by_config, resolve_config
from qtorch.data.panel.frames import index_frame

log = logging.getLogger(__name__)

Frame: TypeAlias = pd.DataFrame
_LEVELS = ["datetime", "instrument"]
OUTSIDE, IN_A_GAP = -1, -2  # instead of a bar's row
_MAX_RUNS = 8  # of adjacent instruments that are copied one by one


def score_frame(signal: Any) -> Frame:
    """Read a signal into a frame by (datetime, instrument) with one column per member.

    `signal`: a frame or series of scores, `(model, dataset)` (the model's predictions for the
    dataset's test segment), or a configuration of one of these. Rows without any score are dropped,
    so such instruments are not traded. Raises DataError for infinite scores, duplicate rows, or an
    index that is not (datetime, instrument).
    """
    signal = resolve_config(signal)
    if isinstance(signal, Mapping | str):
        signal = init_instance_by_config(signal)
    if isinstance(signal, Sequence) and not isinstance(signal, str) and len(signal) == 2:
        model, dataset = (
            init_instance_by_config(s) if isinstance(s, Mapping) else s for s in signal
        )
        signal = model.predict(dataset)
    if isinstance(signal, pd.Series):
        signal = signal.to_frame("score" if signal.name is None else signal.name)
    if not isinstance(signal, pd.DataFrame):
        raise ConfigError(
            f"signal is {type(signal).__name__}; expected a frame or series of scores by "
            "(datetime, instrument), (model, dataset), or a configuration of one of these."
        )
    return _validate_scores(signal)


def _validate_scores(scores: Frame) -> Frame:
    index = scores.index
    if not isinstance(index, pd.MultiIndex) or index.nlevels != 2:
        raise DataError(
            "scores need an index with two levels, (datetime, instrument); got "
            f"{index.nlevels} level(s) named {list(index.names)}."
        )
    if index.names[0] == "instrument" or index.names[1] == "datetime":
        scores = scores.swaplevel()
    scores = index_frame(scores)
    if not scores.shape[1] or not len(scores):
        raise DataError(f"the scores are empty: shape {scores.shape}.")
    values = scores.to_numpy()
    values = values if values.dtype.kind == "f" else values.astype(np.float64)
    is_complete = bool(np.isfinite(values).all())
    infinite = np.zeros(0, dtype=np.bool_) if is_complete else np.isinf(values)
    if infinite.any():
        row = scores.index[int(np.flatnonzero(infinite.any(axis=1))[0])]
        raise DataError(
            f"{int(infinite.sum())} scores are infinite, the first at {row[0]}, {row[1]}; infinite "
            "scores cannot be ranked. Fix the model or its data."
        )
    is_duplicate = scores.index.duplicated()
    if is_duplicate.any():
        row = scores.index[int(np.flatnonzero(is_duplicate)[0])]
        raise DataError(
            f"{int(is_duplicate.sum())} rows of the scores are duplicates, the first at {row[0]}, "
            f"{row[1]}; each (datetime, instrument) may occur only once."
        )
    valid_rows: Frame = scores if is_complete else scores[~np.isnan(values).all(axis=1)]
    if not len(valid_rows):
        raise DataError("every score is NaN.")
    valid_scores: Frame = valid_rows.rename_axis(index=_LEVELS)
    return valid_scores


class Scores:
    """The scores of all members on the bars of a backtest.

    `members` and `instruments` are the names. If several scores of an instrument fall into one bar
    of `calendar`, the latest that is not NaN is used.
    """

    def __init__(self, scores: Frame, calendar: pd.DatetimeIndex, freq: str) -> None:
        self.members = [str(c) for c in scores.columns]
        index: Any = scores.index  # a MultiIndex; the type stubs only know a plain Index
        stamps = pd.DatetimeIndex(index.levels[0]).as_unit("ns")
        names = pd.Index(index.levels[1].astype("str"))
        stamp_codes, name_codes = (np.asarray(c) for c in index.codes)
        stamp_bars = _find_bars(stamps, calendar, freq)
        # The levels may have entries without a row, which would be warned of and traded.
        used_stamps = np.flatnonzero(np.bincount(stamp_codes, minlength=len(stamps)))
        used_names = np.flatnonzero(np.bincount(name_codes, minlength=len(names)))
        is_gap = stamp_bars[used_stamps] == IN_A_GAP
        _warn_non_trading_dates(stamps[used_stamps[is_gap]], calendar)
        self.instruments = names[used_names].sort_values()
        bars = stamp_bars[stamp_codes]
        rows = np.flatnonzero(bars >= 0)
        # Sorted by time, so that a later score of a bar overwrites an earlier one. The codes do
        # not tell the time: the dates of a level may have any order.
        times = stamps.asi8[stamp_codes[rows]]
        if (times[1:] < times[:-1]).any():
            rows = rows[np.argsort(times, kind="stable")]
        used_bars = stamp_bars[used_stamps]
        used_bars = used_bars[used_bars >= 0]
        self._is_overwritten = len(np.unique(used_bars)) < len(used_bars)
        self._names, self._name_codes = names, name_codes[rows]
        values = scores.to_numpy()
        self._scores = values if values.dtype.kind == "f" else values.astype(np.float64)
        self._rows, self._edges = rows, bars[rows].searchsorted(np.arange(len(calendar) + 1))

    def align(self, instruments: pd.Index) -> BarScores:
        """Arrange the scores by `instruments`, which include those of the scores."""
        columns = instruments.get_indexer(self._names)[self._name_codes]
        edges = self._edges.tolist()
        return BarScores(
            self._scores, self._rows, columns, edges, len(instruments), self._is_overwritten
        )


class BarScores:
    """The scores of all members for N instruments, arranged bar by bar when they are read.

    `scores [R, M]` are those of a frame. The scores of a bar are the `rows` from `edges[bar]` to
    `edges[bar + 1]`, and belong to the instruments `columns`; the later ones overwrite the earlier
    ones if `is_overwritten`.
    """

    def __init__(
        self,
        scores: NDArray[Any],
        rows: NDArray[np.intp],
        columns: NDArray[np.intp],
        edges: Sequence[int],
        num_instruments: int,
        is_overwritten: bool,
    ) -> None:
        self._scores, self._rows, self._columns = scores, rows, columns
        self._edges, self._num_instruments = edges, num_instruments
        self._is_overwritten = is_overwritten

    def read(self, bar: int) -> NDArray[np.float64] | None:
        """The scores `[M, N]` of a bar, NaN without a score; None if no member has any."""
        begin, end = self._edges[bar], self._edges[bar + 1]
        if begin == end:
            return None
        rows, columns = self._rows[begin:end], self._columns[begin:end]
        is_block = rows[-1] - rows[0] == end - begin - 1 and not self._is_overwritten
        part = self._scores[rows[0] : rows[-1] + 1] if is_block else self._scores[rows]
        scores = part.T
        values = np.empty((len(scores), self._num_instruments))
        if end - begin < self._num_instruments or self._is_overwritten:
            values.fill(np.nan)
        if self._is_overwritten:
            member, k = (~np.isnan(scores)).nonzero()
            values[member, columns[k]] = scores[member, k]
            return values
        steps = (columns[1:] - columns[:-1] != 1).nonzero()[0] + 1
        if len(steps) > _MAX_RUNS:
            values[:, columns] = scores
            return values
        for first, last in pairwise([0, *steps.tolist(), len(columns)]):
            column = columns[first]
            values[:, column : column + last - first] = scores[:, first:last]
        return values


def _find_bars(stamps: pd.DatetimeIndex, calendar: pd.DatetimeIndex, freq: str) -> NDArray[np.intp]:
    """Return the row of the bar that contains each timestamp.

    It is OUTSIDE for timestamps before or after all bars, IN_A_GAP for those between two bars.
    """
    if not len(calendar):
        return np.full(len(stamps), OUTSIDE)
    bars: NDArray[np.intp] = calendar.searchsorted(stamps, side="right") - 1
    is_inside = bars >= 0
    if freq == "day" or freq.endswith("min"):  # weeks and months last until the next bar
        length = pd.Timedelta(days=1) if freq == "day" else pd.Timedelta(freq)
        is_inside &= stamps < calendar[np.maximum(bars, 0)] + length
    is_outside = (bars < 0) | (bars == len(calendar) - 1)
    return np.where(is_inside, bars, np.where(is_outside, OUTSIDE, IN_A_GAP))


def _warn_non_trading_dates(stamps: pd.DatetimeIndex, calendar: pd.DatetimeIndex) -> None:
    if len(stamps):
        log.warning(
            "ignoring scores of %d dates that are not trading days, the first %s (the calendar "
            "goes from %s to %s)",
            len(stamps),
            stamps[0],
            calendar[0],
            calendar[-1],
        )
