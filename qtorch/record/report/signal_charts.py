"""Charts of a signal's quality: IC by time and horizon, quantiles, autocorrelation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from qtorch.core.dates import name_bars
from qtorch.core.lazy import quick_imports
from qtorch.record.report.chart_style import (
    GRID,
    IC_COLOUR,
    INK,
    RANK_COLOUR,
    SOFT,
    add_legend,
    diverging_map,
    draw_day_bars,
    draw_lines,
    draw_rolling_mean,
    draw_zero_line,
    format_date_axis,
    format_percent_axis,
    label_axis,
    new_figure,
    style_axis,
    style_figure,
    text_colour,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
MIDDLE_COLOUR = "#9aa3ad"
MAX_YEARS_WITH_NUMBERS = 12  # with more years the cells of the heat map have no numbers


def ic_chart(ic: pd.Series, rank_ic: pd.Series) -> Figure:
    """Draw daily IC with its rolling mean, cumulative IC and Rank IC, and the histogram of both.

    It is the picture that SigAnaRecord saves with a run; the report page has `rolling_ic_chart`.
    Both arguments are Series by day; NaN days are left out.
    """
    with quick_imports():  # not pyplot, which has global state and needs a display
        from matplotlib.figure import Figure

    ic, rank_ic = ic.dropna(), rank_ic.dropna()
    figure = Figure(figsize=(11, 7), facecolor="white")
    # Places of the axes in a figure of this size: a layout engine draws all text once more.
    places = {"left": 0.06, "right": 0.99, "bottom": 0.075, "top": 0.86}
    axes = figure.subplot_mosaic(
        [["day", "day"], ["sum", "histogram"]],
        gridspec_kw={**places, "hspace": 0.42, "wspace": 0.16},
    )
    span = f", {ic.index[0]:%Y-%m-%d} to {ic.index[-1]:%Y-%m-%d}" if len(ic) else ""
    title = f"Information coefficient by day{span}"
    figure.suptitle(title, color=INK, fontsize=13, x=0.01, ha="left")
    _draw_daily_ic(axes["day"], ic, rank_ic)
    _draw_cumulative_ic(axes["sum"], ic, rank_ic)
    _draw_histogram(axes["histogram"], ic, rank_ic)
    for name, axis in axes.items():
        style_axis(axis)
        if name != "histogram":
            format_date_axis(axis)
    return figure


def _draw_daily_ic(axis: Any, ic: pd.Series, rank_ic: pd.Series, *, narrow: bool = False) -> None:
    """Draw the daily IC as bars, and the rolling means of IC and Rank IC."""
    draw_day_bars(axis, ic, IC_COLOUR)
    draw_rolling_mean(axis, ic, IC_COLOUR, "IC")
    draw_rolling_mean(axis, rank_ic, RANK_COLOUR, "Rank IC")
    draw_zero_line(axis)
    label_axis(axis, "Daily IC (bars) and rolling means", "correlation")
    add_legend(axis, narrow=narrow)


def _draw_cumulative_ic(
    axis: Any, ic: pd.Series, rank_ic: pd.Series, *, narrow: bool = False
) -> None:
    """Draw cumulative IC and Rank IC."""
    draw_lines(axis, [("IC", ic.cumsum(), IC_COLOUR), ("Rank IC", rank_ic.cumsum(), RANK_COLOUR)])
    draw_zero_line(axis)
    title = "Cumulative" if narrow else "Cumulative: a steady slope is a steady signal"
    label_axis(axis, title, "sum of daily correlations")
    add_legend(axis, narrow=narrow)


def _draw_histogram(axis: Any, ic: pd.Series, rank_ic: pd.Series) -> None:
    """Draw the distributions of both over days, their means as dashed lines."""
    from matplotlib.ticker import MaxNLocator

    bars = name_bars(ic.index)
    # Rounded, because bins cannot be as narrow as the rounding errors of a constant IC.
    values = np.concatenate([ic.to_numpy(), rank_ic.to_numpy()]).round(9)
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
    label_axis(axis, f"Distribution over {len(ic)} {bars}", bars, "correlation")
    axis.margins(y=0.3)
    axis.set_ylim(bottom=0)
    axis.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    frame_style = {"frameon": True, "framealpha": 1.0, "edgecolor": "none"}
    axis.legend(loc="upper left", fontsize=8.5, handlelength=1.2, **frame_style)


def rolling_ic_chart(ic: pd.Series, rank_ic: pd.Series, *, narrow: bool = False) -> Figure:
    """Draw the report page's daily IC with rolling means, and the cumulative sums.

    Days without an IC are left out.
    """
    ic, rank_ic = ic.dropna(), rank_ic.dropna()
    figure, axes = new_figure(2.9, narrow=narrow, rows=2)
    _draw_daily_ic(axes[0], ic, rank_ic, narrow=narrow)
    _draw_cumulative_ic(axes[1], ic, rank_ic, narrow=narrow)
    for axis in axes:
        format_date_axis(axis, narrow=narrow)
    return style_figure(figure)


def monthly_means(daily: pd.Series) -> pd.DataFrame:
    """Return monthly means as a table of years by months 1 to 12; NaN for missing months."""
    daily = daily.dropna()
    dates = pd.DatetimeIndex(daily.index)
    table = daily.groupby([dates.year, dates.month]).mean().unstack()
    return table.reindex(columns=range(1, 13)).rename_axis(index="year", columns="month")


def monthly_chart(ic: pd.Series, *, narrow: bool = False) -> Figure:
    """Draw a heat map of monthly mean IC: one row per year, in the narrow format one per month."""
    from matplotlib.ticker import MaxNLocator

    table = monthly_means(ic)
    years, months = [str(y) for y in table.index], list(MONTHS)
    values = table.to_numpy(dtype=float)
    rows, columns = (months, years) if narrow else (years, months)
    values = values.T if narrow else values
    figure, axes = new_figure(1.0 + 0.3 * max(len(rows), 2), narrow=narrow)
    axis = axes[0]
    limit = np.nanmax(np.abs(values)) or 1.0
    image = axis.pcolormesh(
        np.ma.masked_invalid(values),
        cmap=diverging_map(),
        vmin=-limit,
        vmax=limit,
        edgecolors="white",
        linewidth=1.5,
    )
    axis.set_xticks(np.arange(len(columns)) + 0.5, columns)
    axis.set_yticks(np.arange(len(rows)) + 0.5, rows)
    axis.invert_yaxis()
    if len(years) <= MAX_YEARS_WITH_NUMBERS:
        _write_cells(axis, values, image, size=7.5 if len(years) > 5 and narrow else 8.5)
    if narrow and len(years) > 5:  # the labels would overlap
        step = -(-len(years) // 5)
        axis.set_xticks(axis.get_xticks()[::step], columns[::step])
    label_axis(axis, "Mean IC by month", "month" if narrow else "year")
    axis.set_xlabel("year" if narrow else "month", color=SOFT, fontsize=9)
    bar = figure.colorbar(image, ax=axis, pad=0.02, aspect=12 if not narrow else 25)
    bar.set_label("correlation", color=SOFT, fontsize=9)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=SOFT, labelsize=8, length=0)
    bar.locator = MaxNLocator(nbins=4, symmetric=True)
    bar.update_ticks()
    style_figure(figure)
    axis.grid(False)
    axis.spines["bottom"].set_visible(False)
    return figure


def _write_cells(axis: Any, values: Any, image: Any, size: float) -> None:
    """Write each value of a heat map into its cell, as .05 and with a true minus sign."""
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            colour = text_colour(image.cmap(image.norm(value)))
            text = f"{value:.2f}".replace("0.", ".", 1).replace("-", "−")
            axis.text(
                column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=size, color=colour
            )


def decay_chart(decay: pd.DataFrame, *, bars: str = "trading days", narrow: bool = False) -> Figure:
    """Draw mean IC and Rank IC by horizon, in `bars`, with two standard errors."""
    figure, axes = new_figure(2.9, narrow=narrow)
    axis, positions = axes[0], np.arange(len(decay))
    for shift, name, colour, text in (
        (-0.12, "ic", IC_COLOUR, "IC"),
        (0.12, "rank_ic", RANK_COLOUR, "Rank IC"),
    ):
        axis.errorbar(
            positions + shift,
            decay[name],
            yerr=2 * decay[f"{name}_error"],
            color=colour,
            fmt="o",
            markersize=4.5,
            linewidth=1.4,
            capsize=2.5,
            label=f"{text} ± 2 standard errors",
        )
    draw_zero_line(axis)
    axis.set_xticks(positions, [str(h) for h in decay.index])
    label_axis(axis, "IC by horizon", "mean correlation", f"horizon, {bars}")
    add_legend(axis, narrow=narrow)
    return style_figure(figure)


def quantile_chart(returns: pd.DataFrame, *, narrow: bool = False) -> Figure:
    """Draw the mean return of each score quantile, and cumulative returns minus the mean of all.

    `returns`: one column per quantile, the lowest first; a missing day adds nothing to the sum.
    """
    figure, axes = new_figure(3.0, narrow=narrow, columns=2)
    count = len(returns.columns)
    colours = [_quantile_colour(k, count) for k in range(count)]
    error = 2 * returns.std(ddof=1) / np.sqrt(returns.notna().sum())
    axes[0].bar(
        range(count),
        returns.mean(),
        yerr=error,
        color=colours,
        edgecolor=SOFT,
        linewidth=0.5,
        error_kw={"ecolor": INK, "elinewidth": 1.0, "capsize": 2.5},
    )
    names = [str(q) for q in returns.columns]
    names[0], names[-1] = f"{names[0]}\nlowest", f"{names[-1]}\nhighest"
    axes[0].set_xticks(range(count), names)
    draw_zero_line(axes[0])
    format_percent_axis(axes[0])
    label_axis(
        axes[0], "Mean return by score quantile", "% per label horizon (± 2 s.e.)", "score quantile"
    )
    relative = returns.sub(returns.mean(axis=1), axis=0).fillna(0.0).cumsum()
    for k, column in enumerate(relative):
        end = {0: " (lowest)", count - 1: " (highest)"}.get(k, "")
        draw_lines(axes[1], [(f"{column}{end}", relative[column], colours[k])])
    draw_zero_line(axes[1])
    format_percent_axis(axes[1])
    label_axis(axes[1], "Cumulative, minus the mean of all", "% (sum of daily returns)")
    format_date_axis(axes[1], narrow=True)
    if narrow:
        add_legend(axes[1], narrow=True)
    else:  # next to the axes, in the order of the lines
        handles, labels = axes[1].get_legend_handles_labels()
        position = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
        axes[1].legend(handles[::-1], labels[::-1], frameon=False, fontsize=8.5, **position)
    return style_figure(figure)


def _quantile_colour(k: int, count: int) -> Any:
    """Return the colour of a quantile, from orange over grey to blue, avoiding white."""
    fraction = k / max(count - 1, 1)
    if fraction == 0.5:
        return MIDDLE_COLOUR
    return diverging_map()(fraction * 0.8 if fraction < 0.5 else 0.2 + fraction * 0.8)


def spread_chart(spread: pd.Series, *, narrow: bool = False) -> Figure:
    """Draw the return of the highest minus the lowest quantile, daily and cumulative."""
    figure, axes = new_figure(2.7, narrow=narrow, columns=2)
    spread = spread.dropna()
    draw_day_bars(axes[0], spread, IC_COLOUR)
    draw_rolling_mean(axes[0], spread, RANK_COLOUR)
    label_axis(axes[0], "Highest minus lowest quantile", "% per label horizon")
    add_legend(axes[0], narrow=narrow)
    draw_lines(axes[1], [("sum", spread.cumsum(), IC_COLOUR)])
    label_axis(axes[1], "Cumulative spread", "% (sum of daily returns)")
    for axis in axes:
        draw_zero_line(axis)
        format_percent_axis(axis)
        format_date_axis(axis, narrow=True)
    return style_figure(figure)


def autocorrelation_chart(by_lag: Mapping[int, pd.Series], *, narrow: bool = False) -> Figure:
    """Draw the mean rank correlation of the scores by lag, and that of the first lag by day."""
    figure, axes = new_figure(2.7, narrow=narrow, columns=2)
    means = {lag: daily.mean() for lag, daily in by_lag.items()}
    positions = range(len(means))
    axes[0].bar(positions, list(means.values()), color=IC_COLOUR, width=0.6)
    axes[0].set_xticks(positions, [str(lag) for lag in means])
    axes[0].set_ylim(min(0.0, *means.values()) * 1.1, 1.0)
    draw_zero_line(axes[0])
    lag, daily = next(iter(by_lag.items()))
    label_axis(axes[0], "Mean by lag", "rank correlation", f"lag, {name_bars(daily.index)}")
    axes[1].plot(daily.index, daily, color=GRID, linewidth=0.9)
    draw_rolling_mean(axes[1], daily, IC_COLOUR)
    label_axis(axes[1], f"By day, lag {lag}", "rank correlation")
    format_date_axis(axes[1], narrow=True)
    add_legend(axes[1], narrow=narrow)
    return style_figure(figure)
