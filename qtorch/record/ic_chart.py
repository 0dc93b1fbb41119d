"""The IC chart: daily IC, cumulative IC, and the distribution."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from qtorch.record.chart_style import (
    IC_COLOUR,
    INK,
    RANK_COLOUR,
    add_legend,
    draw_day_bars,
    draw_zero_line,
    format_date_axis,
    label_axis,
    rolling_mean,
    style_axis,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def ic_chart(ic: pd.Series, rank_ic: pd.Series, title: str | None = None) -> Figure:
    """Draw daily IC with its rolling mean, cumulative IC and Rank IC, and the histogram of both.

    Both arguments are Series by day; NaN days are left out.
    """
    from matplotlib.figure import Figure  # not pyplot, which has global state and needs a display

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
    _draw_histogram(axes["spread"], ic, rank_ic)
    for name, axis in axes.items():
        style_axis(axis)
        if name != "spread":
            format_date_axis(axis)
    return figure


def draw_days(axis: Any, ic: pd.Series, rank_ic: pd.Series, *, narrow: bool = False) -> None:
    """Draw the daily IC as bars, and the rolling means of IC and Rank IC."""
    draw_day_bars(axis, ic, IC_COLOUR)
    for series, colour, name in ((ic, IC_COLOUR, "IC"), (rank_ic, RANK_COLOUR, "Rank IC")):
        mean, window = rolling_mean(series)
        axis.plot(
            mean.index, mean, color=colour, linewidth=1.8, label=f"{name}, mean of {window} days"
        )
    draw_zero_line(axis)
    label_axis(axis, "Daily IC (bars) and rolling means", "correlation")
    add_legend(axis, narrow=narrow)


def draw_sum(axis: Any, ic: pd.Series, rank_ic: pd.Series, *, narrow: bool = False) -> None:
    """Draw cumulative IC and Rank IC."""
    for series, colour, name in ((ic, IC_COLOUR, "IC"), (rank_ic, RANK_COLOUR, "Rank IC")):
        total = series.cumsum()
        axis.plot(total.index, total, color=colour, linewidth=1.8, label=name)
    draw_zero_line(axis)
    title = "Cumulative" if narrow else "Cumulative: a steady slope is a steady signal"
    label_axis(axis, title, "sum of daily correlations")
    add_legend(axis, narrow=narrow)


def _draw_histogram(axis: Any, ic: pd.Series, rank_ic: pd.Series) -> None:
    from matplotlib.ticker import MaxNLocator

    values = np.concatenate([ic.to_numpy(), rank_ic.to_numpy()])
    edges = (
        np.histogram_bin_edges(values, bins=min(40, max(5, len(ic) // 8))) if len(values) else 10
    )
    for series, colour, name in ((ic, IC_COLOUR, "IC"), (rank_ic, RANK_COLOUR, "Rank IC")):
        text = f"{name}: mean {series.mean():.4f}, std {series.std():.4f}"
        axis.hist(series, bins=edges, histtype="stepfilled", color=colour, alpha=0.28, label=text)
        axis.hist(series, bins=edges, histtype="step", color=colour, linewidth=1.2)
        if len(series):
            axis.axvline(series.mean(), color=colour, linewidth=1.6, linestyle="--")
    axis.axvline(0, color=INK, linewidth=0.8)
    label_axis(axis, f"Distribution over {len(ic)} days", "days", "correlation of a day")
    axis.margins(y=0.3)
    axis.set_ylim(bottom=0)
    axis.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    frame_style = {"frameon": True, "framealpha": 1.0, "edgecolor": "none"}
    axis.legend(loc="upper left", fontsize=8.5, handlelength=1.2, **frame_style)


def _span(ic: pd.Series) -> str:
    return f", {ic.index[0]:%Y-%m-%d} to {ic.index[-1]:%Y-%m-%d}" if len(ic) else ""
