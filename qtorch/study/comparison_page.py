"""Write the comparison of several runs as one HTML page."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from qtorch.record.report.chart_style import (
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
from qtorch.record.report.page import Page
from qtorch.record.report.results import run_description
from qtorch.study.comparison import (
    SERIES_TITLES,
    Comparison,
    compare_runs,
    differing_params,
    shorten,
)
from qtorch.tracking.recorder import Recorder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = "comparison.html"
MAX_NAME_LENGTH = 26  # of a group's name in a chart; the tables show the full name


def write_comparison(
    recorders: Sequence[Recorder], folder: str | Path, *, tries: int | None = None
) -> Path:
    """Compare runs (`compare_runs`) and write `comparison.html` and its PNGs to a folder."""
    comparison = compare_runs(recorders, tries=tries)
    num_groups = len(comparison.groups)
    description = run_description(recorders[0])
    signal_columns, portfolio_columns = _metric_columns(comparison)
    page = Page(Path(folder))
    drawn_metrics = _draw_runs(page, comparison, signal_columns | portfolio_columns)
    _draw_curves(page, comparison)
    members = [(run, group) for group in comparison.groups for run in group.runs]
    runs_by_sharpe = [
        (run, group, comparison.sharpe[run.id])
        for run, group in members
        if run.id in comparison.sharpe
    ]
    return page.write(
        PAGE,
        "comparison.html.j2",
        title=f"Comparison of {len(members)} runs in {num_groups} group{'s' * (num_groups > 1)}",
        facts={k: description[k] for k in ("Data", "Tested on") if k in description},
        comparison=comparison,
        column_sets=[columns for columns in (signal_columns, portfolio_columns) if columns],
        drawn_metrics=drawn_metrics,
        differing_params=differing_params(comparison.groups),
        series_titles=SERIES_TITLES,
        runs_by_sharpe=sorted(runs_by_sharpe, key=lambda item: -item[2].sharpe),
    )


def _metric_columns(comparison: Comparison) -> tuple[dict[str, str], dict[str, str]]:
    """Return `{metric: heading}` of the signal and of the portfolio metrics that any run has."""
    prefixes = [f"{run.freq}.excess_return_with_cost" for run in comparison.runs]
    # The first run may have no portfolio, and so no frequency of one.
    excess = next(
        (
            prefix
            for prefix, run in zip(prefixes, comparison.runs, strict=True)
            if f"{prefix}.annualized_return" in run.metrics
        ),
        prefixes[0],
    )
    signal = {name: name for name in ("IC", "ICIR", "Rank IC", "Rank ICIR")}
    signal["Long-Short Ann Return"] = "Annual long-short return"
    logged_metrics = {m for run in comparison.runs for m in run.metrics}
    portfolio = {
        f"{excess}.annualized_return": "Annual excess return",
        f"{excess}.information_ratio": "Information ratio",
        f"{excess}.max_drawdown": "Drawdown of the excess return",
    }
    if logged_metrics.isdisjoint(portfolio):  # no benchmark
        portfolio = {
            "report.annualized_return": "Annual return",
            "report.sharpe_ratio": "Sharpe ratio",
            "report.max_drawdown": "Drawdown",
        }
    portfolio["report.turnover"] = "Daily turnover"
    signal_columns, portfolio_columns = (
        {m: h for m, h in part.items() if m in logged_metrics} for part in (signal, portfolio)
    )
    return signal_columns, portfolio_columns


def _draw_runs(page: Page, comparison: Comparison, columns: dict[str, str]) -> list[str]:
    """Draw the dots of each run: IC, Rank IC and one return; return the headings of these."""
    returns = [m for m in columns if m.endswith(("annualized_return", "Ann Return"))]
    # Prefer the portfolio's return, whose column is the last one, to that of long-short.
    drawn_metrics = [m for m in ("IC", "Rank IC") if m in columns] + returns[-1:]
    values = {
        columns[m]: {
            g.name: [r.metrics[m] for r in g.runs if m in r.metrics] for g in comparison.groups
        }
        for m in drawn_metrics
    }
    if values:
        page.draw("by_run", dots_chart, values, percent=[columns[m] for m in returns])
    return list(values)


def _draw_curves(page: Page, comparison: Comparison) -> None:
    for series, title, unit in (
        ("rank_ic", "Cumulative Rank IC", "sum of daily correlations"),
        ("returns", "Cumulative return", "% (sum of daily returns)"),
    ):
        tables = {g.name: g.by_run(series) for g in comparison.groups}
        tables = {name: t for name, t in tables.items() if t.shape[1]}
        if tables:
            percent = series == "returns"
            page.draw(f"cumulative_{series}", curves_chart, tables, title, unit, percent=percent)


def curves_chart(
    by_group: Mapping[str, pd.DataFrame],
    title: str,
    unit: str,
    *,
    percent: bool = False,
    narrow: bool = False,
) -> Figure:
    """Draw cumulative daily values: the mean of a group's runs, and a band from minimum to maximum.

    `by_group` maps names to frames of days by runs.
    """
    figure, axes = new_figure(3.1, narrow=narrow)
    axis = axes[0]
    for number, (name, frame) in enumerate(by_group.items()):
        colour, dashes = _group_style(number)
        total = frame.dropna().cumsum()  # sums compare only if all runs have the same days
        if total.shape[1] > 1:
            low, high = total.min(axis=1), total.max(axis=1)
            axis.fill_between(total.index, low, high, color=colour, alpha=0.15, linewidth=0)
        mean = total.mean(axis=1)
        axis.plot(
            mean.index,
            mean,
            color=colour,
            linestyle=dashes,
            linewidth=1.8,
            label=_chart_name(name),
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
    """Draw one panel per metric: a dot per run in its group's row, and a bar at the group's mean.

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
        names = [_chart_name(g) for g in by_group] if narrow or position == 0 else [""] * groups
        axis.set_yticks(range(groups), names)
        axis.axvline(0, color=INK, linewidth=0.8)
        axis.locator_params(axis="x", nbins=5)
        axis.set_title(metric, loc="left", fontsize=10, color=INK)
        unit = "%" if metric in percent else "correlation"
        if metric in percent:
            axis.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
        axis.set_xlabel(f"{unit} (dot: run, bar: mean)", fontsize=8.5, color=SOFT)
    return style_figure(figure)


def _chart_name(group: str) -> str:
    """Shorten a group's name for a chart: settings by the last part of their keys."""
    return shorten(re.sub(r"[\w@/]+\.(?=[\w.]*=)", "", group), MAX_NAME_LENGTH)


def _group_style(number: int) -> tuple[str, str]:
    """Return the colour and dash pattern of a group; colours repeat with other dashes."""
    return SERIES[number % len(SERIES)], DASHES[number // len(SERIES) % len(DASHES)]
