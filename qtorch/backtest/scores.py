"""Read and validate the signal of a strategy, and arrange its scores by bar for the backtest."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
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
    values = scores.to_numpy(dtype=np.float64)
    infinite = np.isinf(values)
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
    valid_rows: Frame = scores[~np.isnan(values).all(axis=1)]
    if not len(valid_rows):
        raise DataError("every score is NaN.")
    valid_scores: Frame = valid_rows.rename_axis(index=_LEVELS)
    return valid_scores


class Scores:
    """The scores of all members on the bars of a backtest.

    `members` and `instruments` are the names; `has_scores [D]` tells whether any member has a
    score on a bar of `calendar`. If several scores of an instrument fall into one bar, the latest
    that is not NaN is used.
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
        self._bars, self._rows, self._scores = bars[rows], rows, scores.to_numpy()
        self.has_scores: NDArray[np.bool_] = np.zeros(len(calendar), dtype=np.bool_)
        self.has_scores[self._bars] = True

    def align(self, instruments: pd.Index) -> NDArray[Any]:
        """The scores `[D, M, N]` of instruments, which include those of the scores.

        NaN means no score.
        """
        scores = self._scores
        dtype = scores.dtype if scores.dtype.kind == "f" else np.dtype(np.float64)
        shape = (len(self.has_scores), len(self.members), len(instruments))
        values: NDArray[Any] = np.full(shape, np.nan, dtype=dtype)
        columns = instruments.get_indexer(self._names)[self._name_codes]
        if self._is_overwritten:
            for m in range(len(self.members)):
                has_score = ~np.isnan(scores[self._rows, m].astype(np.float64))
                values[self._bars[has_score], m, columns[has_score]] = scores[
                    self._rows[has_score], m
                ]
            return values
        edges = self._bars.searchsorted(np.arange(shape[0] + 1))
        for bar in np.flatnonzero(self.has_scores):
            part = slice(edges[bar], edges[bar + 1])
            values[bar][:, columns[part]] = scores[self._rows[part]].T
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
