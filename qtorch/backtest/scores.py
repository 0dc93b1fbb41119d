"""Scores as a strategy is given them, and as the simulation reads them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from qtorch.core.errors import ConfigError, DataError
from qtorch.core.instantiate import init_instance_by_config, plain

log = logging.getLogger(__name__)

Frame: TypeAlias = pd.DataFrame
_LEVELS = ["datetime", "instrument"]


def score_frame(signal: Any) -> Frame:
    """Scores as a frame by (datetime, instrument) with a column a member.

    `signal`: a frame or series, `(model, dataset)` (the model's scores of the dataset's test
    segment), or a configuration of either. Rows without any score are left out: what has no
    score is not traded for. Raises DataError for infinite scores, doubled rows, or an index that
    is not by date and instrument.
    """
    signal = plain(signal)
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
            f"signal is {type(signal).__name__}; expected scores as a frame or series by "
            "(datetime, instrument), (model, dataset), or a configuration of one."
        )
    return _checked(signal)


def _checked(scores: Frame) -> Frame:
    index = scores.index
    if not isinstance(index, pd.MultiIndex) or index.nlevels != 2:
        raise DataError(
            "scores need an index of two levels, (datetime, instrument); got "
            f"{index.nlevels} level(s) named {list(index.names)}."
        )
    if index.names[0] == "instrument" or index.names[1] == "datetime":
        scores = scores.swaplevel()
    if not scores.shape[1] or not len(scores):
        raise DataError(f"scores of shape {scores.shape} hold no score.")
    values = scores.to_numpy(dtype=np.float64)
    infinite = np.isinf(values)
    if infinite.any():
        row = scores.index[int(np.flatnonzero(infinite.any(axis=1))[0])]
        raise DataError(
            f"{int(infinite.sum())} scores are infinite, the first at {row[0]}, {row[1]}; mend the "
            "model or its data: an infinite score ranks nothing."
        )
    doubled = scores.index.duplicated()
    if doubled.any():
        row = scores.index[int(np.flatnonzero(doubled)[0])]
        raise DataError(
            f"{int(doubled.sum())} rows of the scores stand twice, the first at {row[0]}, "
            f"{row[1]}; each (datetime, instrument) may stand once."
        )
    kept: Frame = scores[~np.isnan(values).all(axis=1)]
    if not len(kept):
        raise DataError("every score is NaN.")
    named: Frame = kept.rename_axis(index=_LEVELS)
    return named


class Scores:
    """The scores of all members on the bars of a backtest.

    `values [D, M, N]` over the bars of `calendar` and the instruments of `instruments`; NaN is
    no score. A bar takes the last score of each instrument that is stamped within it.
    """

    def __init__(self, scores: Frame, calendar: pd.DatetimeIndex, freq: str) -> None:
        self.members = [str(c) for c in scores.columns]
        stamps = pd.DatetimeIndex(scores.index.levels[0]).as_unit("ns")  # type: ignore[attr-defined]
        names = pd.Index(scores.index.levels[1].astype("str"))  # type: ignore[attr-defined]
        codes = [np.asarray(c) for c in scores.index.codes]  # type: ignore[attr-defined]
        bars = _bars_of(stamps, calendar, freq)
        used = np.unique(codes[0])
        _say_outside(stamps[used[bars[used] == -2]], calendar)
        self.instruments = names[np.unique(codes[1])].sort_values()
        place = self.instruments.get_indexer(names)
        rows, columns = bars[codes[0]], place[codes[1]]
        keep = np.flatnonzero(rows >= 0)
        keep = keep[np.argsort(codes[0][keep], kind="stable")]  # later stamps overwrite
        shape = (len(calendar), len(self.members), len(self.instruments))
        given = scores.to_numpy()
        kind = given.dtype if given.dtype.kind == "f" else np.float64
        self.values: NDArray[Any] = np.full(shape, np.nan, dtype=kind)
        for m in range(len(self.members)):
            there = keep[~np.isnan(given[keep, m].astype(np.float64))]
            self.values[rows[there], m, columns[there]] = given[there, m]


def _bars_of(stamps: pd.DatetimeIndex, calendar: pd.DatetimeIndex, freq: str) -> NDArray[np.intp]:
    """The bar that holds each stamp; -1 before or after all bars, -2 in a gap between them."""
    bars: NDArray[np.intp] = calendar.searchsorted(stamps, side="right") - 1
    if not len(calendar):
        return np.full(len(stamps), -1)
    unit = pd.Timedelta(freq) if freq.endswith("min") else pd.Timedelta(days=1)
    begin = calendar[np.maximum(bars, 0)]
    within = stamps < begin + unit
    if freq not in ("day",) and not freq.endswith("min"):  # weeks and months reach to the next
        within = np.ones(len(stamps), dtype=bool)
    outside = np.where((bars < 0) | (bars == len(calendar) - 1), -1, -2)
    return np.where((bars >= 0) & within, bars, outside)


def _say_outside(stamps: pd.DatetimeIndex, calendar: pd.DatetimeIndex) -> None:
    if len(stamps):
        log.warning(
            "%d dates of the scores are no trading days and are not used, the first %s (the "
            "calendar goes from %s to %s).",
            len(stamps),
            stamps[0],
            calendar[0],
            calendar[-1],
        )
