"""The return of the benchmark on each bar of a backtest."""

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
    """Return of the benchmark on each bar, as a fraction; all NaN without a benchmark.

    `benchmark`: an instrument; a universe or a list of instruments (the mean return of those that
    trade on the bar); or a series of returns by date. A bar without a return counts as 0, as in
    Qlib. Difference from Qlib: a series that covers none of the dates, and a name that is neither
    an instrument nor a universe, are errors.
    """
    if benchmark is None:
        return pd.Series(np.nan, index=dates, name="bench")
    if isinstance(benchmark, pd.Series):
        returns = benchmark.copy()
        returns.index = pd.DatetimeIndex(returns.index).as_unit("ns")
        returns = returns.reindex(dates)
        if returns.isna().all():
            raise DataError(
                f"the benchmark's returns cover none of {dates[0]:%Y-%m-%d}..{dates[-1]:%Y-%m-%d}."
            )
    else:
        panel = source.feature_panel(
            _resolve_instruments(benchmark, source), [_RETURN], dates[0], dates[-1], freq
        )
        returns = (
            panel.to_frame()[_RETURN].astype(np.float64).groupby(level=0).mean().reindex(dates)
        )
    return returns.fillna(0.0).rename("bench")


def _resolve_instruments(benchmark: str | Sequence[str], source: Source) -> str | list[str]:
    instruments = source.instrument_names()
    if isinstance(benchmark, str):
        if benchmark in instruments:
            return [benchmark]
        if benchmark in source.universes():
            return benchmark
        names = [*source.universes(), *sorted(instruments)]
        raise DataError(
            unknown_name("benchmark (an instrument or a universe)", benchmark, names, limit=8)
        )
    for name in benchmark:
        if name not in instruments:
            raise DataError(unknown_name("instrument of the benchmark", name, sorted(instruments)))
    return list(benchmark)
