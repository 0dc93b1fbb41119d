"""The picture of a signal's quality: IC by day, its sum, its distribution."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from qtorch.record.chart_style import (
    IC_COLOUR,
    INK,
    RANK_COLOUR,
    calm,
    date_axis,
    day_bars,
    legend,
    name_axis,
    rolling_mean,
    zero_line,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def ic_chart(ic: pd.Series, rank_ic: pd.Series, title: str | None = None) -> Figure:
    """Daily IC with its rolling mean; cumulative IC and Rank IC; the histogram of both.

    Series by day; days without a figure (NaN) are left out.
    """
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    ic, rank_ic = ic.dropna(), rank_ic.dropna()
    figure = Figure(figsize=(11, 7), layout="constrained", facecolor="white")
    axes = figure.subplot_mosaic([["day", "day"], ["sum", "spread"]], height_ratios=[1.0, 1.0])
    figure.suptitle(
        title or f"Information coefficient by day{_span(ic)}",
        color=INK,
        fontsize=13,
        x=0.01,
        ha="left",
    )
    draw_days(axes["day"], ic, rank_ic)
    draw_sum(axes["sum"], ic, rank_ic)
    _draw_spread(axes["spread"], ic, rank_ic)
    for name, axis in axes.items():
        calm(axis)
        if name != "spread":
            date_axis(axis)
    return figure


def draw_days(axis: Any, ic: pd.Series, rank_ic: pd.Series, *, narrow: bool = False) -> None:
    """The IC of each day as a bar, and the rolling means of both."""
    day_bars(axis, ic, IC_COLOUR)
    for series, colour, name in ((ic, IC_COLOUR, "IC"), (rank_ic, RANK_COLOUR, "Rank IC")):
        mean, window = rolling_mean(series)
        axis.plot(
            mean.index, mean, color=colour, linewidth=1.8, label=f"{name}, mean of {window} days"
        )
    zero_line(axis)
    name_axis(axis, "Daily IC (bars) and rolling means", "correlation")
    legend(axis, narrow=narrow)


def draw_sum(axis: Any, ic: pd.Series, rank_ic: pd.Series, *, narrow: bool = False) -> None:
    """Both added up from day to day."""
    for series, colour, name in ((ic, IC_COLOUR, "IC"), (rank_ic, RANK_COLOUR, "Rank IC")):
        total = series.cumsum()
        axis.plot(total.index, total, color=colour, linewidth=1.8, label=name)
    zero_line(axis)
    title = "Cumulative" if narrow else "Cumulative: a steady slope is a steady signal"
    name_axis(axis, title, "sum of daily correlations")
    legend(axis, narrow=narrow)


def _draw_spread(axis: Any, ic: pd.Series, rank_ic: pd.Series) -> None:
    from matplotlib.ticker import MaxNLocator

    values = np.concatenate([ic.to_numpy(), rank_ic.to_numpy()])
    edges = (
        np.histogram_bin_edges(values, bins=min(40, max(5, len(ic) // 8))) if len(values) else 10
    )
    for series, colour, name in ((ic, IC_COLOUR, "IC"), (rank_ic, RANK_COLOUR, "Rank IC")):
        told = f"{name}: mean {series.mean():.4f}, std {series.std():.4f}"
        axis.hist(series, bins=edges, histtype="stepfilled", color=colour, alpha=0.28, label=told)
        axis.hist(series, bins=edges, histtype="step", color=colour, linewidth=1.2)
        if len(series):
            axis.axvline(series.mean(), color=colour, linewidth=1.6, linestyle="--")
    axis.axvline(0, color=INK, linewidth=0.8)
    name_axis(axis, f"Distribution over {len(ic)} days", "days", "correlation of a day")
    axis.margins(y=0.3)
    axis.set_ylim(bottom=0)
    axis.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    box = {"frameon": True, "framealpha": 1.0, "edgecolor": "none"}
    axis.legend(loc="upper left", fontsize=8.5, handlelength=1.2, **box)


def _span(ic: pd.Series) -> str:
    return f", {ic.index[0]:%Y-%m-%d} to {ic.index[-1]:%Y-%m-%d}" if len(ic) else ""
