"""What a signal is worth, in pictures: IC by time and horizon, quantiles, autocorrelation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from qtorch.record.chart_style import (
    GRID,
    IC_COLOUR,
    INK,
    RANK_COLOUR,
    SOFT,
    date_axis,
    day_bars,
    diverging_map,
    finish,
    legend,
    name_axis,
    new_figure,
    percent_axis,
    readable_on,
    rolling_mean,
    zero_line,
)
from qtorch.record.ic_chart import draw_days, draw_sum

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
MIDDLE = "#9aa3ad"
MOST_SHOWN = 12  # years with a number in each cell of the heat map


def rolling_ic_chart(ic: pd.Series, rank_ic: pd.Series, *, narrow: bool = False) -> Figure:
    """IC of each day with rolling means, and the sums; days without one are left out."""
    ic, rank_ic = ic.dropna(), rank_ic.dropna()
    figure, axes = new_figure(2.9, narrow=narrow, rows=2)
    draw_days(axes[0], ic, rank_ic, narrow=narrow)
    draw_sum(axes[1], ic, rank_ic, narrow=narrow)
    for axis in axes:
        date_axis(axis, narrow=narrow)
    return finish(figure)


def monthly(daily: pd.Series) -> pd.DataFrame:
    """The mean of each month: years by months 1 to 12, NaN where there is none."""
    daily = daily.dropna()
    dates = pd.DatetimeIndex(daily.index)
    table = daily.groupby([dates.year, dates.month]).mean().unstack()
    return table.reindex(columns=range(1, 13)).rename_axis(index="year", columns="month")


def monthly_chart(daily: pd.Series, name: str = "IC", *, narrow: bool = False) -> Figure:
    """Heat map of the mean of each month: years down, on a phone months down."""
    table = monthly(daily)
    years, months = [str(y) for y in table.index], list(MONTHS)
    values = table.to_numpy(dtype=float)
    rows, columns = (months, years) if narrow else (years, months)
    values = values.T if narrow else values
    figure, axes = new_figure(1.0 + 0.3 * max(len(rows), 2), narrow=narrow)
    axis = axes[0]
    reach = np.nanmax(np.abs(values)) or 1.0
    image = axis.pcolormesh(
        np.ma.masked_invalid(values),
        cmap=diverging_map(),
        vmin=-reach,
        vmax=reach,
        edgecolors="white",
        linewidth=1.5,
    )
    axis.set_xticks(np.arange(len(columns)) + 0.5, columns)
    axis.set_yticks(np.arange(len(rows)) + 0.5, rows)
    axis.invert_yaxis()
    if len(years) <= MOST_SHOWN:
        _write_cells(axis, values, image, size=7.5 if len(years) > 5 and narrow else 8.5)
    if narrow and len(years) > 5:  # their names would touch
        every = -(-len(years) // 5)
        axis.set_xticks(axis.get_xticks()[::every], columns[::every])
    name_axis(axis, f"Mean {name} by month", "month" if narrow else "year")
    axis.set_xlabel("year" if narrow else "month", color=SOFT, fontsize=9)
    bar = figure.colorbar(image, ax=axis, pad=0.02, aspect=12 if not narrow else 25)
    bar.set_label("correlation", color=SOFT, fontsize=9)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=SOFT, labelsize=8, length=0)
    bar.locator = _few_ticks()
    bar.update_ticks()
    finish(figure)
    axis.grid(False)
    axis.spines["bottom"].set_visible(False)
    return figure


def _few_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=4, symmetric=True)


def _write_cells(axis: Any, values: Any, image: Any, size: float) -> None:
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            colour = readable_on(image.cmap(image.norm(value)))
            text = f"{value:.2f}".replace("0.", ".", 1).replace("-", "−")
            axis.text(
                column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=size, color=colour
            )


def decay_chart(decay: pd.DataFrame, *, narrow: bool = False) -> Figure:
    """IC and Rank IC by horizon with their standard errors."""
    figure, axes = new_figure(2.9, narrow=narrow)
    axis, place = axes[0], np.arange(len(decay))
    for shift, name, colour, told in (
        (-0.12, "ic", IC_COLOUR, "IC"),
        (0.12, "rank_ic", RANK_COLOUR, "Rank IC"),
    ):
        axis.errorbar(
            place + shift,
            decay[name],
            yerr=2 * decay[f"{name}_error"],
            color=colour,
            fmt="o",
            markersize=4.5,
            linewidth=1.4,
            capsize=2.5,
            label=f"{told} ± 2 standard errors",
        )
    zero_line(axis)
    axis.set_xticks(place, [str(h) for h in decay.index])
    name_axis(axis, "IC by horizon", "mean correlation", "horizon, trading days")
    legend(axis, narrow=narrow)
    return finish(figure)


def quantile_chart(returns: pd.DataFrame, *, narrow: bool = False) -> Figure:
    """Mean return of each score quantile; their cumulative returns over the mean of all."""
    figure, axes = new_figure(3.0, narrow=narrow, columns=2)
    count = len(returns.columns)
    colours = [_graded(k, count) for k in range(count)]
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
    zero_line(axes[0])
    percent_axis(axes[0])
    name_axis(
        axes[0], "Mean return by score quantile", "% per label horizon (± 2 s.e.)", "score quantile"
    )
    over = returns.sub(returns.mean(axis=1), axis=0).fillna(0.0).cumsum()
    for k, column in enumerate(over):
        end = {0: " (lowest)", count - 1: " (highest)"}.get(k, "")
        axes[1].plot(
            over.index, over[column], color=colours[k], linewidth=1.8, label=f"{column}{end}"
        )
    zero_line(axes[1])
    percent_axis(axes[1])
    name_axis(axes[1], "Cumulative, less the mean of all", "% (sum of daily returns)")
    date_axis(axes[1], narrow=True)
    if narrow:
        legend(axes[1], narrow=True)
    else:  # beside the axes, in the order of the lines
        handles, told = axes[1].get_legend_handles_labels()
        place = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
        axes[1].legend(handles[::-1], told[::-1], frameon=False, fontsize=8.5, **place)
    return finish(figure)


def _graded(k: int, count: int) -> Any:
    """From orange over grey to blue, away from the map's white middle."""
    place = k / max(count - 1, 1)
    if place == 0.5:
        return MIDDLE
    return diverging_map()(place * 0.8 if place < 0.5 else 0.2 + place * 0.8)


def spread_chart(spread: pd.Series, *, narrow: bool = False) -> Figure:
    """The return of the highest quantile less that of the lowest, by day and added up."""
    figure, axes = new_figure(2.7, narrow=narrow, columns=2)
    spread = spread.dropna()
    day_bars(axes[0], spread, IC_COLOUR)
    mean, window = rolling_mean(spread)
    axes[0].plot(mean.index, mean, color=RANK_COLOUR, linewidth=1.8, label=f"mean of {window} days")
    name_axis(axes[0], "Highest less lowest quantile", "% per label horizon")
    legend(axes[0], narrow=narrow)
    total = spread.cumsum()
    axes[1].plot(total.index, total, color=IC_COLOUR, linewidth=1.8)
    name_axis(axes[1], "Cumulative spread", "% (sum of daily returns)")
    for axis in axes:
        zero_line(axis)
        percent_axis(axis)
        date_axis(axis, narrow=True)
    return finish(figure)


def autocorrelation_chart(by_lag: Mapping[int, pd.Series], *, narrow: bool = False) -> Figure:
    """Mean rank correlation of the scores by lag, and that of neighbouring days through time."""
    figure, axes = new_figure(2.7, narrow=narrow, columns=2)
    means = {lag: daily.mean() for lag, daily in by_lag.items()}
    place = range(len(means))
    axes[0].bar(place, list(means.values()), color=IC_COLOUR, width=0.6)
    axes[0].set_xticks(place, [str(lag) for lag in means])
    axes[0].set_ylim(min(0.0, *means.values()) * 1.1, 1.0)
    zero_line(axes[0])
    name_axis(axes[0], "Mean by lag", "rank correlation", "lag, trading days")
    lag, daily = next(iter(by_lag.items()))
    axes[1].plot(daily.index, daily, color=GRID, linewidth=0.9)
    mean, window = rolling_mean(daily)
    axes[1].plot(mean.index, mean, color=IC_COLOUR, linewidth=1.8, label=f"mean of {window} days")
    name_axis(axes[1], f"By day, lag {lag}", "rank correlation")
    date_axis(axes[1], narrow=True)
    legend(axes[1], narrow=narrow)
    return finish(figure)
