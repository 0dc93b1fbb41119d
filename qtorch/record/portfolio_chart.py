"""What a portfolio did, in pictures: returns, drawdown, turnover and cost, concentration."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from qtorch.metrics.curve import Mode, cumulative_return, drawdown
from qtorch.record.chart_style import (
    BENCH_COLOUR,
    GROSS_COLOUR,
    IC_COLOUR,
    LONG,
    NET_COLOUR,
    RANK_COLOUR,
    SERIES,
    date_axis,
    day_bars,
    finish,
    from_zero,
    legend,
    lines,
    name_axis,
    new_figure,
    percent_axis,
    rolling_mean,
    zero_line,
)
from qtorch.record.run_results import has_benchmark, judged_return, net_return

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNITS = {"sum": "% (sum of daily returns)", "product": "% (compounded)"}
FALL_UNITS = {"sum": "% of the start", "product": "% of the highest value"}


def return_chart(report: pd.DataFrame, mode: Mode = "sum", *, narrow: bool = False) -> Figure:
    """Cumulative return with and without cost, and the benchmark's."""
    curves = [
        ("without cost", report["return"], GROSS_COLOUR),
        ("with cost", net_return(report), NET_COLOUR),
    ]
    if has_benchmark(report):
        curves.append(("benchmark", report["bench"], BENCH_COLOUR))
    return _curves("Cumulative return", curves, mode, narrow)


def excess_chart(report: pd.DataFrame, mode: Mode = "sum", *, narrow: bool = False) -> Figure:
    """Cumulative return in excess of the benchmark, with and without cost."""
    curves = [
        ("without cost", report["return"] - report["bench"], GROSS_COLOUR),
        ("with cost", judged_return(report), NET_COLOUR),
    ]
    return _curves("Cumulative return over the benchmark", curves, mode, narrow)


def _curves(
    title: str, curves: list[tuple[str, pd.Series, str]], mode: Mode, narrow: bool
) -> Figure:
    figure, axes = new_figure(2.9, narrow=narrow)
    lines(axes[0], [(n, cumulative_return(r, mode), c) for n, r, c in curves])
    zero_line(axes[0])
    name_axis(axes[0], title, UNITS[mode])
    percent_axis(axes[0])
    date_axis(axes[0], narrow=narrow)
    legend(axes[0], narrow=narrow)
    return finish(figure)


def drawdown_chart(report: pd.DataFrame, mode: Mode = "sum", *, narrow: bool = False) -> Figure:
    """How far the account, its excess and the benchmark lie under their highest points."""
    figure, axes = new_figure(2.7, narrow=narrow)
    axis, net = axes[0], net_return(report)
    fall = drawdown(net, mode)
    axis.fill_between(fall.index, fall, 0, color=NET_COLOUR, alpha=0.25, linewidth=0)
    curves = [("portfolio, with cost", fall, NET_COLOUR)]
    if has_benchmark(report):
        over = drawdown(net - report["bench"], mode)
        curves.append(("excess, with cost", over, RANK_COLOUR))
        curves.append(("benchmark", drawdown(report["bench"], mode), BENCH_COLOUR))
    lines(axis, curves, width=1.4)
    zero_line(axis)
    percent_axis(axis)
    name_axis(axis, "Drawdown", FALL_UNITS[mode])
    date_axis(axis, narrow=narrow)
    legend(axis, narrow=narrow)
    return finish(figure)


def turnover_chart(report: pd.DataFrame, *, narrow: bool = False) -> Figure:
    """Turnover of each day with its rolling mean; the cost added up."""
    figure, axes = new_figure(2.7, narrow=narrow, columns=2)
    turnover = report["turnover"]
    day_bars(axes[0], turnover, IC_COLOUR)
    mean, window = rolling_mean(turnover)
    lines(axes[0], [(f"mean of {window} days", mean, RANK_COLOUR)])
    name_axis(axes[0], "Turnover by day", "% of the account")
    legend(axes[0], narrow=narrow)
    lines(axes[1], [("cost", report["cost"].cumsum(), RANK_COLOUR)])
    name_axis(axes[1], "Cumulative cost", "% (sum of daily costs)")
    for axis in axes:
        from_zero(axis)
        percent_axis(axis)
        date_axis(axis, narrow=True)
    return finish(figure)


def concentration_chart(spread: pd.DataFrame, *, narrow: bool = False) -> Figure:
    """Positions and their effective number, largest weight, Herfindahl index, exposure and cash.

    `spread` is the frame of `qtorch.metrics.concentration`, with a column cash (share of the
    account).
    """
    figure, axes = new_figure(2.4, narrow=narrow, rows=2, columns=2)
    largest, told = spread["largest_weight"], ""
    if len(spread) > LONG:  # years of days that jump would be a block of colour
        _, window = rolling_mean(largest)
        spread = spread.apply(lambda column: rolling_mean(column)[0])
        told = f", mean of {window} days"
    counts = [
        ("positions", spread["num_positions"], SERIES[0]),
        ("effective number", spread["effective_positions"], SERIES[1]),
    ]
    lines(axes[0], counts, width=1.4)
    name_axis(axes[0], f"Positions{told}", "number")
    lines(axes[1], [("largest weight", largest, SERIES[0])], width=1.0)
    name_axis(axes[1], "Largest weight", "% of the account")
    lines(axes[2], [("Herfindahl", spread["herfindahl"], SERIES[0])], width=1.4)
    name_axis(axes[2], f"Herfindahl index{told}", "sum of squared shares")
    shares = [("invested", spread["gross"], SERIES[0]), ("cash", spread["cash"], SERIES[1])]
    if not spread["gross"].equals(spread["net"]):
        shares.append(("net", spread["net"], SERIES[2]))
    lines(axes[3], shares, width=1.4)
    name_axis(axes[3], f"Exposure{told}", "% of the account")
    for axis in axes:
        date_axis(axis, narrow=True)
        from_zero(axis)
    for axis in (axes[1], axes[3]):
        percent_axis(axis)
    for axis in (axes[0], axes[3]):
        legend(axis, narrow=narrow)
    return finish(figure)
