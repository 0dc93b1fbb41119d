"""The picture of a signal's quality: IC by day, its sum, its distribution."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, SOFT, GRID = "#1f2933", "#8a94a0", "#e4e7eb"
IC_COLOUR, RANK_COLOUR = "#2364aa", "#e07a1f"
ROLLING_DAYS = 20


def ic_chart(ic: pd.Series, rank_ic: pd.Series, title: str | None = None) -> Figure:
    """Daily IC with its rolling mean; cumulative IC and Rank IC; the histogram of both.

    Series by day; days without a figure (NaN) are left out.
    """
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
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
    _draw_days(axes["day"], ic, rank_ic)
    _draw_sum(axes["sum"], ic, rank_ic)
    _draw_spread(axes["spread"], ic, rank_ic)
    for name, axis in axes.items():
        _calm(axis)
        if name != "spread":
            locator = AutoDateLocator(minticks=4, maxticks=8)  # type: ignore[no-untyped-call]
            axis.xaxis.set_major_locator(locator)
            form = ConciseDateFormatter(locator)  # type: ignore[no-untyped-call]
            axis.xaxis.set_major_formatter(form)
            axis.margins(x=0.01)
    return figure


def _draw_days(axis: Any, ic: pd.Series, rank_ic: pd.Series) -> None:
    axis.vlines(ic.index, 0, ic.to_numpy(), color=IC_COLOUR, alpha=0.25, linewidth=0.9)
    window = min(ROLLING_DAYS, max(1, len(ic) // 4))
    for series, colour, name in ((ic, IC_COLOUR, "IC"), (rank_ic, RANK_COLOUR, "Rank IC")):
        mean = series.rolling(window, min_periods=max(1, window // 2)).mean()
        axis.plot(
            mean.index, mean, color=colour, linewidth=1.8, label=f"{name}, mean of {window} days"
        )
    axis.axhline(0, color=INK, linewidth=0.8)
    axis.set_title("Daily IC (bars) and rolling means", loc="left", fontsize=10, color=INK)
    axis.set_ylabel("correlation", color=SOFT, fontsize=9)
    axis.legend(**_above(2))


def _draw_sum(axis: Any, ic: pd.Series, rank_ic: pd.Series) -> None:
    for series, colour, name in ((ic, IC_COLOUR, "IC"), (rank_ic, RANK_COLOUR, "Rank IC")):
        total = series.cumsum()
        axis.plot(total.index, total, color=colour, linewidth=1.8, label=name)
    axis.axhline(0, color=INK, linewidth=0.8)
    axis.set_title(
        "Cumulative: a steady slope is a steady signal", loc="left", fontsize=10, color=INK
    )
    axis.set_ylabel("sum of daily correlations", color=SOFT, fontsize=9)
    axis.legend(**_above(2))


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
    axis.set_title(f"Distribution over {len(ic)} days", loc="left", fontsize=10, color=INK)
    axis.set_xlabel("correlation of a day", color=SOFT, fontsize=9)
    axis.set_ylabel("days", color=SOFT, fontsize=9)
    axis.margins(y=0.3)
    axis.set_ylim(bottom=0)
    axis.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    box = {"frameon": True, "framealpha": 1.0, "edgecolor": "none"}
    axis.legend(loc="upper left", fontsize=8.5, handlelength=1.2, **box)


def _above(columns: int) -> dict[str, Any]:
    """A legend over the axes' right end, where it hides nothing."""
    place = {"loc": "lower right", "bbox_to_anchor": (1.0, 0.98), "borderaxespad": 0.0}
    return {**place, "frameon": False, "fontsize": 9, "ncols": columns}


def _calm(axis: Any) -> None:
    axis.grid(axis="y", color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(colors=SOFT, labelsize=8.5, length=0)
    for side, spine in axis.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GRID)


def _span(ic: pd.Series) -> str:
    return f", {ic.index[0]:%Y-%m-%d} to {ic.index[-1]:%Y-%m-%d}" if len(ic) else ""
