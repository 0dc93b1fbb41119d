"""Charts of groups of runs: the mean of each group and the range of its seeds."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from qtorch.record.chart_style import (
    DASHES,
    INK,
    SERIES,
    SOFT,
    add_legend,
    draw_zero_line,
    format_date_axis,
    format_percent_axis,
    label_axis,
    new_figure,
    style_figure,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


MAX_NAME_LENGTH = 26  # of a group's name in a chart; the tables show the full name


def _group_style(number: int) -> tuple[str, str]:
    """Colour and dash pattern of a group; colours repeat with other dashes."""
    return SERIES[number % len(SERIES)], DASHES[number // len(SERIES) % len(DASHES)]


def _shorten(name: str) -> str:
    return name if len(name) <= MAX_NAME_LENGTH else name[: MAX_NAME_LENGTH - 1] + "…"


def curves_chart(
    by_group: Mapping[str, pd.DataFrame],
    title: str,
    unit: str,
    *,
    percent: bool = False,
    narrow: bool = False,
) -> Figure:
    """Cumulative daily values: the mean of a group's runs, and a band from minimum to maximum.

    `by_group` maps names to frames of days by runs.
    """
    figure, axes = new_figure(3.1, narrow=narrow)
    axis = axes[0]
    for number, (name, table) in enumerate(by_group.items()):
        colour, dashes = _group_style(number)
        total = table.dropna().cumsum()
        if total.shape[1] > 1:
            low, high = total.min(axis=1), total.max(axis=1)
            axis.fill_between(total.index, low, high, color=colour, alpha=0.15, linewidth=0)
        mean = total.mean(axis=1)
        axis.plot(
            mean.index, mean, color=colour, linestyle=dashes, linewidth=1.8, label=_shorten(name)
        )
    draw_zero_line(axis)
    label_axis(axis, title, unit)
    if percent:
        format_percent_axis(axis)
    format_date_axis(axis, narrow=narrow)
    add_legend(axis, narrow=narrow)
    return style_figure(figure)


def dots_chart(
    by_metric: Mapping[str, Mapping[str, Sequence[float]]],
    *,
    percent: Collection[str] = (),
    narrow: bool = False,
) -> Figure:
    """One panel per metric: a dot per run in its group's row, and a bar at the group's mean.

    Metrics named in `percent` are fractions, which are shown as percentages.
    """
    from matplotlib.ticker import PercentFormatter

    groups = len(next(iter(by_metric.values())))
    figure, axes = new_figure(0.95 + 0.28 * groups, narrow=narrow, columns=len(by_metric))
    for position, (axis, (metric, by_group)) in enumerate(
        zip(axes, by_metric.items(), strict=True)
    ):
        for row, values in enumerate(by_group.values()):
            finite = [v for v in values if np.isfinite(v)]
            colour, _ = _group_style(row)
            axis.plot(finite, [row] * len(finite), "o", color=colour, markersize=6, alpha=0.65)
            if finite:
                axis.plot([np.mean(finite)] * 2, [row - 0.3, row + 0.3], color=INK, linewidth=1.6)
        axis.set_ylim(groups - 0.5, -0.5)
        names = [_shorten(g) for g in by_group] if narrow or position == 0 else [""] * groups
        axis.set_yticks(range(groups), names)
        axis.axvline(0, color=INK, linewidth=0.8)
        axis.locator_params(axis="x", nbins=5)
        axis.set_title(metric, loc="left", fontsize=10, color=INK)
        unit = "%" if metric in percent else "correlation"
        if metric in percent:
            axis.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
        axis.set_xlabel(f"{unit} (dot: run, bar: mean)", fontsize=8.5, color=SOFT)
    return style_figure(figure)
