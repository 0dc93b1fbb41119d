"""How every figure looks: one palette, one axis style, a wide and a narrow form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, SOFT, GRID = "#1f2933", "#5f6b78", "#e4e7eb"
IC_COLOUR, RANK_COLOUR = "#2364aa", "#e07a1f"
NET_COLOUR, GROSS_COLOUR, BENCH_COLOUR = IC_COLOUR, "#56b4e9", "#5f6b78"
# Told apart by the colour-blind too: the palette of Okabe and Ito without yellow, led by ours.
SERIES = (IC_COLOUR, RANK_COLOUR, "#009e73", "#cc79a7", "#56b4e9", "#000000", "#b58900")
DASHES = ("-", "--", "-.", ":")
ROLLING_DAYS, LONG_ROLLING_DAYS, LONG = 20, 60, 750  # days; over LONG the longer window

# Inches at 96 dots each: a column of the page, the width of a phone.
WIDE, NARROW = 9.0, 3.75
# Letters that a line of title and legend has room for, and what a handle takes of them.
WIDE_LETTERS, NARROW_LETTERS, HANDLE_LETTERS, SHORT_HANDLE_LETTERS = 112, 56, 9, 6


def new_figure(
    height: float, *, narrow: bool, rows: int = 1, columns: int = 1
) -> tuple[Figure, Any]:
    """A figure and its axes, an array `[rows, columns]`; stacked in one column where narrow.

    `height` is that of one row in inches. Without pyplot: no global state, no display.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    if narrow:
        rows, columns = rows * columns, 1
    size = (NARROW if narrow else WIDE, height * rows)
    layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06, wspace=0.06, hspace=0.04)
    figure = Figure(figsize=size, layout=layout, facecolor="white")
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, axes.reshape(-1)


def finish(figure: Figure) -> Figure:
    """The same calm axes on all panels of a figure."""
    for axis in figure.axes:
        if axis.get_label() != "<colorbar>":
            calm(axis)
    return figure


def calm(axis: Any) -> None:
    """A light grid, no frame, small ticks."""
    axis.grid(axis="y", color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(colors=SOFT, labelsize=8.5, length=0)
    axis.tick_params(axis="x", pad=6)
    for side, spine in axis.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GRID)


def name_axis(axis: Any, title: str, y: str, x: str | None = None) -> None:
    """Title on the left, axes with their units."""
    axis.set_title(title, loc="left", fontsize=10, color=INK)
    axis.set_ylabel(y, color=SOFT, fontsize=9)
    if x is not None:
        axis.set_xlabel(x, color=SOFT, fontsize=9)


def legend(axis: Any, *, narrow: bool = False) -> None:
    """A legend that hides nothing: beside the title where both fit, else under it."""
    handles, names = axis.get_legend_handles_labels()
    if not handles:
        return
    title = axis.get_title(loc="left")
    grid = axis.get_gridspec()
    room = NARROW_LETTERS if narrow else WIDE_LETTERS // (grid.ncols if grid else 1)
    entry = max(map(len, names)) + SHORT_HANDLE_LETTERS
    plain = {"frameon": False, "fontsize": 8.5 if narrow else 9, "borderaxespad": 0.0}
    beside = len(title) + 4 + sum(len(n) + HANDLE_LETTERS for n in names) <= room
    if beside and not narrow:
        place = {"loc": "lower right", "bbox_to_anchor": (1.0, 0.98), "ncols": len(names)}
        axis.legend(handles, names, **place, **plain)
        return
    columns = max(1, min(len(names), room // entry))
    rows = -(-len(names) // columns)
    axis.set_title(title, loc="left", fontsize=10, color=INK, pad=9 + 12.5 * rows)
    axis.legend(
        handles,
        names,
        loc="lower left",
        bbox_to_anchor=(0.0, 1.01),
        ncols=columns,
        handlelength=1.4,
        columnspacing=1.2,
        labelspacing=0.25,
        borderpad=0.0,
        **plain,
    )


def date_axis(axis: Any, *, narrow: bool = False) -> None:
    """Few dates, written short."""
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

    # Steps of half a year at most: so many ticks that no span falls between months and years.
    least, most = (2, 5) if narrow else (4, 9)
    locator = AutoDateLocator(minticks=least, maxticks=most)  # type: ignore[no-untyped-call]
    axis.xaxis.set_major_locator(locator)
    axis.xaxis.set_major_formatter(ConciseDateFormatter(locator))  # type: ignore[no-untyped-call]
    axis.margins(x=0.01)
    axis.set_xlabel("date", color=SOFT, fontsize=9)


def from_zero(axis: Any) -> None:
    """The vertical axis from zero (or what lies under it) to a little over the highest value."""
    low, high = axis.dataLim.y0, axis.dataLim.y1
    low, high = (min(0.0, low), high) if np.isfinite(high) else (0.0, 1.0)
    axis.set_ylim(low, low + 1.12 * ((high - low) or 1.0))


def percent_axis(axis: Any, decimals: int | None = None) -> None:
    """Fractions written as per cent; the unit is named by the axis' label."""
    from matplotlib.ticker import PercentFormatter

    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=decimals, symbol=""))


def zero_line(axis: Any) -> None:
    """Where nothing is gained or lost."""
    axis.axhline(0, color=INK, linewidth=0.8)


def rolling_mean(series: pd.Series) -> tuple[pd.Series, int]:
    """The mean over the last days (20; 60 for years, fewer for weeks), and how many they are."""
    usual = LONG_ROLLING_DAYS if len(series) > LONG else ROLLING_DAYS
    window = min(usual, max(1, len(series) // 4))
    return series.rolling(window, min_periods=max(1, window // 2)).mean(), window


def day_bars(axis: Any, series: pd.Series, colour: str, alpha: float = 0.25) -> None:
    """A thin bar a day."""
    axis.vlines(
        series.index,
        0,
        series.to_numpy(),
        color=colour,
        alpha=alpha,
        linewidth=0.9,
        rasterized=False,
    )


def lines(
    axis: Any, series: Sequence[tuple[str, pd.Series, str]], width: float = 1.8, style: str = "-"
) -> None:
    """Named series in their colours."""
    for name, values, colour in series:
        axis.plot(values.index, values, color=colour, linewidth=width, linestyle=style, label=name)


def diverging_map() -> Any:
    """Orange for negative, white for zero, blue for positive: safe for the colour-blind."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("ic", [RANK_COLOUR, "#ffffff", IC_COLOUR])


def readable_on(colour: Sequence[float]) -> str:
    """Ink or white, whichever can be read on a colour (red, green, blue in 0 to 1)."""
    light = float(np.dot(colour[:3], (0.299, 0.587, 0.114)))
    return INK if light > 0.55 else "#ffffff"
