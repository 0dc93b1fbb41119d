"""The style of all charts: one palette, one axis style, a wide and a narrow format."""

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
# Safe for colour-blind readers: the palette of Okabe and Ito without yellow, after our two colours.
SERIES = (IC_COLOUR, RANK_COLOUR, "#009e73", "#cc79a7", "#56b4e9", "#000000", "#b58900")
DASHES = ("-", "--", "-.", ":")
# Windows of the rolling means; series longer than LONG_HISTORY_DAYS use the longer one.
ROLLING_DAYS, LONG_ROLLING_DAYS, LONG_HISTORY_DAYS = 20, 60, 750

# Widths in inches at 96 DPI: a column of the page, and the screen of a phone.
WIDE, NARROW = 9.0, 3.75
# Characters that fit into the line of title and legend, and the width of a legend handle in them.
WIDE_CHARACTERS, NARROW_CHARACTERS, HANDLE_CHARACTERS, SHORT_HANDLE_CHARACTERS = 112, 56, 9, 6


def new_figure(
    height: float, *, narrow: bool, rows: int = 1, columns: int = 1
) -> tuple[Figure, Any]:
    """Create a figure and its axes as a flat array in row order; one column if narrow.

    `height` is the height of one row in inches. Does not use pyplot, so that there is no global
    state and no display.
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


def style_figure(figure: Figure) -> Figure:
    """Apply the axis style to all panels of a figure, and return the figure."""
    for axis in figure.axes:
        if axis.get_label() != "<colorbar>":
            style_axis(axis)
    return figure


def style_axis(axis: Any) -> None:
    """Give an axis a light grid, no frame and small ticks."""
    axis.grid(axis="y", color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(colors=SOFT, labelsize=8.5, length=0)
    axis.tick_params(axis="x", pad=6)
    for side, spine in axis.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GRID)


def label_axis(axis: Any, title: str, y: str, x: str | None = None) -> None:
    """Set the title on the left, and the axis labels with their units."""
    axis.set_title(title, loc="left", fontsize=10, color=INK)
    axis.set_ylabel(y, color=SOFT, fontsize=9)
    if x is not None:
        axis.set_xlabel(x, color=SOFT, fontsize=9)


def add_legend(axis: Any, *, narrow: bool = False) -> None:
    """Add a legend that covers no data: next to the title if both fit, else below it."""
    handles, names = axis.get_legend_handles_labels()
    if not handles:
        return
    title = axis.get_title(loc="left")
    grid = axis.get_gridspec()
    num_characters = NARROW_CHARACTERS if narrow else WIDE_CHARACTERS // (grid.ncols if grid else 1)
    entry_width = max(map(len, names)) + SHORT_HANDLE_CHARACTERS
    style = {"frameon": False, "fontsize": 8.5 if narrow else 9, "borderaxespad": 0.0}
    fits_in_title_line = (
        len(title) + 4 + sum(len(n) + HANDLE_CHARACTERS for n in names) <= num_characters
    )
    if fits_in_title_line and not narrow:
        position = {"loc": "lower right", "bbox_to_anchor": (1.0, 0.98), "ncols": len(names)}
        axis.legend(handles, names, **position, **style)
        return
    columns = max(1, min(len(names), num_characters // entry_width))
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
        **style,
    )


def format_date_axis(axis: Any, *, narrow: bool = False) -> None:
    """Format the horizontal axis with few, short dates."""
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

    # Enough ticks for steps of at most half a year, so that labels are not all of one year.
    min_ticks, max_ticks = (2, 5) if narrow else (4, 9)
    locator = AutoDateLocator(minticks=min_ticks, maxticks=max_ticks)  # type: ignore[no-untyped-call]
    axis.xaxis.set_major_locator(locator)
    axis.xaxis.set_major_formatter(ConciseDateFormatter(locator))  # type: ignore[no-untyped-call]
    axis.margins(x=0.01)
    axis.set_xlabel("date", color=SOFT, fontsize=9)


def start_at_zero(axis: Any) -> None:
    """Start the vertical axis at zero (or below, for negative values), with room at the top."""
    low, high = axis.dataLim.y0, axis.dataLim.y1
    low, high = (min(0.0, low), high) if np.isfinite(high) else (0.0, 1.0)
    axis.set_ylim(low, low + 1.12 * ((high - low) or 1.0))


def format_percent_axis(axis: Any, decimals: int | None = None) -> None:
    """Format fractions as percent, without a sign: the axis label names the unit."""
    from matplotlib.ticker import PercentFormatter

    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=decimals, symbol=""))


def draw_zero_line(axis: Any) -> None:
    """Draw a horizontal line at zero."""
    axis.axhline(0, color=INK, linewidth=0.8)


def rolling_mean(series: pd.Series) -> tuple[pd.Series, int]:
    """Return a trailing mean and its window: 20 days, 60 for long series, fewer for short ones."""
    max_window = LONG_ROLLING_DAYS if len(series) > LONG_HISTORY_DAYS else ROLLING_DAYS
    window = min(max_window, max(1, len(series) // 4))
    return series.rolling(window, min_periods=max(1, window // 2)).mean(), window


def draw_day_bars(axis: Any, series: pd.Series, colour: str) -> None:
    """Draw one thin bar per day."""
    axis.vlines(series.index, 0, series.to_numpy(), color=colour, alpha=0.25, linewidth=0.9)


def draw_lines(axis: Any, series: Sequence[tuple[str, pd.Series, str]], width: float = 1.8) -> None:
    """Draw named series in their colours."""
    for name, values, colour in series:
        axis.plot(values.index, values, color=colour, linewidth=width, label=name)


def draw_rolling_mean(axis: Any, series: pd.Series, colour: str, name: str = "") -> None:
    """Draw the `rolling_mean` of a series; the legend says its name and window."""
    mean, window = rolling_mean(series)
    prefix = f"{name}, " if name else ""
    draw_lines(axis, [(f"{prefix}mean of {window} days", mean, colour)])


def diverging_map() -> Any:
    """Return a colour map safe for the colour-blind: orange negative, white zero, blue positive."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("ic", [RANK_COLOUR, "#ffffff", IC_COLOUR])


def text_colour(colour: Sequence[float]) -> str:
    """Return dark or white text, whichever is readable on a colour (RGB from 0 to 1)."""
    lightness = float(np.dot(colour[:3], (0.299, 0.587, 0.114)))
    return INK if lightness > 0.55 else "#ffffff"
