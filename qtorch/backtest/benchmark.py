"""The benchmark's returns on the bars of a backtest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import pandas as pd

from qtorch.core.errors import DataError, unknown_name
from qtorch.data.source.base import Source

Benchmark: TypeAlias = str | Sequence[str] | pd.Series | None
_RETURN = "$close/Ref($close, 1)-1"


def benchmark_returns(
    benchmark: Benchmark, source: Source, dates: pd.DatetimeIndex, freq: str
) -> pd.Series:
    """The return of each bar, a fraction; NaN throughout without a benchmark.

    `benchmark`: an instrument, a universe or a list of instruments (their mean over those that
    trade), or a series of returns by date. Bars without a return count as 0, as in Qlib.
    Difference: a series that covers none of the dates, and a name that is neither an instrument
    nor a universe, are errors.
    """
    if benchmark is None:
        return pd.Series(np.nan, index=dates, name="bench")
    if isinstance(benchmark, pd.Series):
        found = benchmark.copy()
        found.index = pd.DatetimeIndex(found.index).as_unit("ns")
        found = found.reindex(dates)
        if found.isna().all():
            raise DataError(
                f"the benchmark's returns cover none of {dates[0]:%Y-%m-%d}..{dates[-1]:%Y-%m-%d}."
            )
    else:
        panel = source.feature_panel(
            _instruments(benchmark, source), [_RETURN], dates[0], dates[-1], freq
        )
        found = panel.to_frame()[_RETURN].astype(np.float64).groupby(level=0).mean().reindex(dates)
    return found.fillna(0.0).rename("bench")


def _instruments(benchmark: str | Sequence[str], source: Source) -> str | list[str]:
    stored = source.stored_instruments()
    if isinstance(benchmark, str):
        if benchmark in stored:
            return [benchmark]
        if benchmark in source.universes():
            return benchmark
        known = [*source.universes(), *sorted(stored)]
        raise DataError(
            unknown_name("benchmark (an instrument or a universe)", benchmark, known, limit=8)
        )
    for name in benchmark:
        if name not in stored:
            raise DataError(unknown_name("instrument of the benchmark", name, sorted(stored)))
    return list(benchmark)
