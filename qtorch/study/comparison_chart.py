"""Groups of runs in pictures: the mean of each with the range of its seeds."""

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
    date_axis,
    finish,
    legend,
    name_axis,
    new_figure,
    percent_axis,
    zero_line,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


MOST_LETTERS = 26  # of a group's name in a figure; the tables have it whole


def _look(number: int) -> tuple[str, str]:
    """Colour and dashes of a group: a colour comes again with other dashes."""
    return SERIES[number % len(SERIES)], DASHES[number // len(SERIES) % len(DASHES)]


def _short(name: str) -> str:
    return name if len(name) <= MOST_LETTERS else name[: MOST_LETTERS - 1] + "…"


def curves_chart(
    by_group: Mapping[str, pd.DataFrame],
    title: str,
    unit: str,
    *,
    percent: bool = False,
    narrow: bool = False,
) -> Figure:
    """Daily values added up: the mean of a group's runs, and a band from the least to the most.

    `by_group` holds frames of days by runs.
    """
    figure, axes = new_figure(3.1, narrow=narrow)
    axis = axes[0]
    for number, (name, table) in enumerate(by_group.items()):
        colour, dashes = _look(number)
        total = table.dropna().cumsum()
        if total.shape[1] > 1:
            low, high = total.min(axis=1), total.max(axis=1)
            axis.fill_between(total.index, low, high, color=colour, alpha=0.15, linewidth=0)
        mean = total.mean(axis=1)
        axis.plot(
            mean.index, mean, color=colour, linestyle=dashes, linewidth=1.8, label=_short(name)
        )
    zero_line(axis)
    name_axis(axis, title, unit)
    if percent:
        percent_axis(axis)
    date_axis(axis, narrow=narrow)
    legend(axis, narrow=narrow)
    return finish(figure)


def dots_chart(
    by_metric: Mapping[str, Mapping[str, Sequence[float]]],
    *,
    percent: Collection[str] = (),
    narrow: bool = False,
) -> Figure:
    """A panel a metric: each run a dot in its group's row, the mean of the group a bar.

    Metrics named in `percent` are fractions that are written as per cent.
    """
    from matplotlib.ticker import PercentFormatter

    groups = len(next(iter(by_metric.values())))
    figure, axes = new_figure(0.95 + 0.28 * groups, narrow=narrow, columns=len(by_metric))
    for place, (axis, (metric, by_group)) in enumerate(zip(axes, by_metric.items(), strict=True)):
        for row, values in enumerate(by_group.values()):
            held = [v for v in values if np.isfinite(v)]
            colour, _ = _look(row)
            axis.plot(held, [row] * len(held), "o", color=colour, markersize=6, alpha=0.65)
            if held:
                axis.plot([np.mean(held)] * 2, [row - 0.3, row + 0.3], color=INK, linewidth=1.6)
        axis.set_ylim(groups - 0.5, -0.5)
        names = [_short(g) for g in by_group] if narrow or place == 0 else [""] * groups
        axis.set_yticks(range(groups), names)
        axis.axvline(0, color=INK, linewidth=0.8)
        axis.locator_params(axis="x", nbins=5)
        axis.set_title(metric, loc="left", fontsize=10, color=INK)
        unit = "%" if metric in percent else "correlation"
        if metric in percent:
            axis.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
        axis.set_xlabel(f"{unit} (dot: run, bar: mean)", fontsize=8.5, color=SOFT)
    return finish(figure)
