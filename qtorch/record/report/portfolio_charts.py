"""Charts of a portfolio: returns, drawdown, turnover and cost, concentration."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from qtorch.metrics.risk import Mode, cumulative_return, drawdown
from qtorch.record.report.chart_style import (
    BENCH_COLOUR,
    GROSS_COLOUR,
    IC_COLOUR,
    LONG_HISTORY_DAYS,
    NET_COLOUR,
    RANK_COLOUR,
    SERIES,
    add_legend,
    draw_day_bars,
    draw_lines,
    draw_rolling_mean,
    draw_zero_line,
    format_date_axis,
    format_percent_axis,
    label_axis,
    new_figure,
    rolling_mean,
    start_at_zero,
    style_figure,
)
from qtorch.record.report.results import has_benchmark, net_excess_return, net_return

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVE_UNITS = {"sum": "% (sum of daily returns)", "product": "% (compounded)"}
DRAWDOWN_UNITS = {"sum": "% of the initial value", "product": "% of the highest value"}


def return_chart(report: pd.DataFrame, mode: Mode = "sum", *, narrow: bool = False) -> Figure:
    """Draw the cumulative return with and without cost, and that of the benchmark."""
    curves = [
        ("without cost", report["return"], GROSS_COLOUR),
        ("with cost", net_return(report), NET_COLOUR),
    ]
    if has_benchmark(report):
        curves.append(("benchmark", report["bench"], BENCH_COLOUR))
    return _draw_curves("Cumulative return", curves, mode, narrow)


def excess_chart(report: pd.DataFrame, mode: Mode = "sum", *, narrow: bool = False) -> Figure:
    """Draw the cumulative return in excess of the benchmark, with and without cost."""
    curves = [
        ("without cost", report["return"] - report["bench"], GROSS_COLOUR),
        ("with cost", net_excess_return(report), NET_COLOUR),
    ]
    return _draw_curves("Cumulative return over the benchmark", curves, mode, narrow)


def _draw_curves(
    title: str, curves: list[tuple[str, pd.Series, str]], mode: Mode, narrow: bool
) -> Figure:
    figure, axes = new_figure(2.9, narrow=narrow)
    lines = [(name, cumulative_return(daily, mode), colour) for name, daily, colour in curves]
    draw_lines(axes[0], lines)
    draw_zero_line(axes[0])
    label_axis(axes[0], title, CURVE_UNITS[mode])
    format_percent_axis(axes[0])
    format_date_axis(axes[0], narrow=narrow)
    add_legend(axes[0], narrow=narrow)
    return style_figure(figure)


def drawdown_chart(report: pd.DataFrame, mode: Mode = "sum", *, narrow: bool = False) -> Figure:
    """Draw the drawdown of the account, of its excess return and of the benchmark."""
    figure, axes = new_figure(2.7, narrow=narrow)
    axis, net = axes[0], net_return(report)
    net_drawdown = drawdown(net, mode)
    axis.fill_between(
        net_drawdown.index, net_drawdown, 0, color=NET_COLOUR, alpha=0.25, linewidth=0
    )
    curves = [("portfolio, with cost", net_drawdown, NET_COLOUR)]
    if has_benchmark(report):
        excess_drawdown = drawdown(net - report["bench"], mode)
        curves.append(("excess, with cost", excess_drawdown, RANK_COLOUR))
        curves.append(("benchmark", drawdown(report["bench"], mode), BENCH_COLOUR))
    draw_lines(axis, curves, width=1.4)
    draw_zero_line(axis)
    format_percent_axis(axis)
    label_axis(axis, "Drawdown", DRAWDOWN_UNITS[mode])
    format_date_axis(axis, narrow=narrow)
    add_legend(axis, narrow=narrow)
    return style_figure(figure)


def turnover_chart(report: pd.DataFrame, *, narrow: bool = False) -> Figure:
    """Draw the daily turnover with its rolling mean, and the cumulative cost."""
    figure, axes = new_figure(2.7, narrow=narrow, columns=2)
    turnover = report["turnover"]
    draw_day_bars(axes[0], turnover, IC_COLOUR)
    draw_rolling_mean(axes[0], turnover, RANK_COLOUR)
    label_axis(axes[0], "Daily turnover", "% of the account")
    add_legend(axes[0], narrow=narrow)
    draw_lines(axes[1], [("cost", report["cost"].cumsum(), RANK_COLOUR)])
    label_axis(axes[1], "Cumulative cost", "% (sum of daily costs)")
    for axis in axes:
        start_at_zero(axis)
        format_percent_axis(axis)
        format_date_axis(axis, narrow=True)
    return style_figure(figure)


def concentration_chart(table: pd.DataFrame, *, narrow: bool = False) -> Figure:
    """Draw the number of positions, largest weight, Herfindahl index, exposure and cash.

    `table` is the frame of `qtorch.metrics.concentration` with a column `cash` (a fraction of the
    account).
    """
    figure, axes = new_figure(2.4, narrow=narrow, rows=2, columns=2)
    title_suffix = ""
    largest_weight = table["largest_weight"]  # never smoothed: a mean would hide its peaks
    if len(table) > LONG_HISTORY_DAYS:
        # Smooth the other series: years of daily jumps would be a solid block of colour.
        _, window = rolling_mean(largest_weight)
        table = table.apply(lambda column: rolling_mean(column)[0])
        title_suffix = f", mean of {window} days"
    counts = [
        ("positions", table["num_positions"], SERIES[0]),
        ("effective number", table["effective_positions"], SERIES[1]),
    ]
    draw_lines(axes[0], counts, width=1.4)
    label_axis(axes[0], f"Positions{title_suffix}", "number")
    draw_lines(axes[1], [("largest weight", largest_weight, SERIES[0])], width=1.0)
    label_axis(axes[1], "Largest weight", "% of the account")
    draw_lines(axes[2], [("Herfindahl", table["herfindahl"], SERIES[0])], width=1.4)
    label_axis(axes[2], f"Herfindahl index{title_suffix}", "sum of squared shares")
    shares = [("invested", table["gross"], SERIES[0]), ("cash", table["cash"], SERIES[1])]
    if not table["gross"].equals(table["net"]):  # there are short positions
        shares.append(("net", table["net"], SERIES[2]))
    draw_lines(axes[3], shares, width=1.4)
    label_axis(axes[3], f"Exposure{title_suffix}", "% of the account")
    for axis in axes:
        format_date_axis(axis, narrow=True)
        start_at_zero(axis)
    for axis in (axes[1], axes[3]):
        format_percent_axis(axis)
    for axis in (axes[0], axes[3]):
        add_legend(axis, narrow=narrow)
    return style_figure(figure)
