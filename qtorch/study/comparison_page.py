"""Write the comparison of several runs as one HTML page."""

from __future__ import annotations

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
from qtorch.record.report.page import (
    Cell,
    Markup,
    Number,
    Page,
    collapsible,
    facts,
    paragraph,
    table,
)
from qtorch.record.report.results import run_description
from qtorch.study.comparison import (
    SERIES_TITLES,
    Comparison,
    RunGroup,
    compare_runs,
    differing_params,
)
from qtorch.tracking.recorder import Recorder

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
    for number, (name, frame) in enumerate(by_group.items()):
        colour, dashes = _group_style(number)
        total = frame.dropna().cumsum()
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


PAGE = "comparison.html"
SHORT_ID = 8


def write_comparison(
    recorders: Sequence[Recorder], folder: str | Path, *, tries: int | None = None
) -> Path:
    """Compare runs (`compare_runs`) and write `comparison.html` and its PNGs to a folder."""
    comparison = compare_runs(recorders, tries=tries)
    groups = len(comparison.groups)
    title = f"Comparison of {len(comparison.runs)} runs in {groups} group{'s' * (groups > 1)}"
    page = Page(Path(folder), title)
    description = run_description(recorders[0])
    common = {k: description[k] for k in ("Data", "Tested on") if k in description}
    page.add(f"<header>\n<h1>{title}</h1>", facts(common.items()), "</header>")
    _add_groups(page, comparison)
    _add_curves(page, comparison)
    _add_tests(page, comparison)
    _add_sharpe(page, comparison)
    _add_runs(page, comparison)
    return page.write(PAGE)


def _metric_columns(comparison: Comparison) -> tuple[dict[str, str], dict[str, str]]:
    """`{metric: heading}` of the signal and of the portfolio metrics that any run has."""
    excess = f"{comparison.runs[0].freq}.excess_return_with_cost"
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


def _add_groups(page: Page, comparison: Comparison) -> None:
    parts = _metric_columns(comparison)
    tables = [
        table(
            ["Group", "Runs", *columns.values()],
            [[g.name, str(len(g.runs)), *(_mean_and_std_cell(g, m) for m in columns)]
             for g in comparison.groups],
        )
        for columns in parts
        if columns
    ]  # fmt: skip
    differing = differing_params(comparison.groups)
    names = [group.name for group in comparison.groups]
    page.section(
        "Groups",
        paragraph("Runs whose parameters are equal except for the seed form a group. Cells show "
                  "mean ± standard deviation over its runs (no deviation for one run).", "note"),
        *tables,
        _runs_picture(page, comparison, parts[0] | parts[1]),
        collapsible("Parameters that differ", table(
            ["Parameter", *names], [[k, *v] for k, v in differing.items()], kind="wrap"))
        if differing else "",
    )  # fmt: skip


def _runs_picture(page: Page, comparison: Comparison, columns: dict[str, str]) -> str:
    returns = [m for m in columns if m.endswith(("annualized_return", "Ann Return"))]
    drawn_metrics = [m for m in ("IC", "Rank IC") if m in columns] + sorted(returns)[:1]
    values = {
        columns[m]: {g.name: [r.metrics[m] for r in g.runs if m in r.metrics]
                     for g in comparison.groups}
        for m in drawn_metrics
    }  # fmt: skip
    if not values:
        return ""
    percent = [columns[m] for m in returns]
    alt_text = f"{', '.join(values)} of each run, by group."
    return page.picture("by_run", dots_chart, values, percent=percent, alt_text=alt_text)


def _mean_and_std_cell(group: RunGroup, metric: str) -> Cell:
    mean, std = group.mean_and_std(metric)
    if mean != mean:
        return "–"
    first = Number(metric, mean, group.name).html()
    if std != std:
        return Markup(first)
    return Markup(f"{first} ± {Number(f'{metric}.std', std, group.name).html()}")


def _add_curves(page: Page, comparison: Comparison) -> None:
    pictures = []
    for series, title, unit in (
        ("rank_ic", "Cumulative Rank IC", "sum of daily correlations"),
        ("returns", "Cumulative return", "% (sum of daily returns)"),
    ):
        tables = {g.name: g.by_run(series) for g in comparison.groups}
        tables = {name: t for name, t in tables.items() if t.shape[1]}
        if tables:
            pictures.append(
                page.picture(f"cumulative_{series}", curves_chart, tables, title, unit,
                             percent=series == "returns", alt_text=f"{title} by group.")
            )  # fmt: skip
    note = (
        f"Return: {comparison.returns_description}. "
        "Line: mean of the runs; band: minimum to maximum."
    )
    page.section("Over time", paragraph(note, "note"), *pictures)


def _add_tests(page: Page, comparison: Comparison) -> None:
    if len(comparison.groups) < 2:
        note = "All runs belong to one group, so there is nothing to test them against."
        page.section("Paired tests", paragraph(note, "missing"))
        return
    rows: list[Sequence[Cell]] = [
        [
            SERIES_TITLES[t.series],
            f"{t.first} − {t.second}",
            Number(f"{t.series}.difference" if t.series != "returns" else "return",
                   t.test.mean, f"{t.first} − {t.second}"),
            Number("t", t.test.statistic, f"{t.first} − {t.second}"),
            Number(f"{t.series}.p_value", t.test.p_value, f"{t.first} − {t.second}"),
            Number(f"{t.series}.adjusted_p_value", t.adjusted_p_value, f"{t.first} − {t.second}"),
            f"{t.test.count:,}",
        ]
        for t in comparison.tests
    ]  # fmt: skip
    lags = sorted({t.test.lags for t in comparison.tests})
    page.section(
        "Paired tests",
        paragraph("Each group is represented by the daily mean of its runs. The standard error is "
                  "that of Newey and West, which allows for autocorrelation "
                  f"({', '.join(map(str, lags))} lags); p-values are two-sided and adjusted by "
                  "Holm's method for the number of pairs. They measure the uncertainty over days, "
                  "not over seeds.", "note"),
        table(["Series", "Groups", "Mean difference", "t", "p", "Adjusted p", "Days"], rows),
    )  # fmt: skip


def _add_sharpe(page: Page, comparison: Comparison) -> None:
    if not comparison.sharpe:
        page.section("Deflated Sharpe ratio", paragraph(
            "No run has daily returns. Add PortAnaRecord, or SigAnaRecord with "
            "ana_long_short=true, to the record section of the tasks.", "missing"))  # fmt: skip
        return
    group_and_seed = {r.id: (g.name, r.seed) for g in comparison.groups for r in g.runs}
    sorted_runs = sorted(comparison.sharpe.items(), key=lambda item: -item[1].sharpe)
    rows: list[Sequence[Cell]] = [
        [
            run[:SHORT_ID],
            group_and_seed[run][0],
            group_and_seed[run][1],
            Number("sharpe", result.sharpe, run),
            Number("expected_best", result.expected_best, run),
            Number("deflated_sharpe", result.probability, run),
            f"{result.count:,}",
        ]
        for run, result in sorted_runs
    ]
    tries = Number("tries", comparison.tries).html()
    source = "the compared runs" if comparison.tries == len(comparison.runs) else "as given"
    page.section(
        "Deflated Sharpe ratio",
        Markup(f'<p>Number of tries: <strong>{tries}</strong> ({source}). If more strategies '
               "were tried than are shown here, set <code>tries=N</code>.</p>"),
        paragraph("“Best by luck” is the Sharpe ratio that the best of so many strategies without "
                  "skill would be expected to reach. The deflated Sharpe ratio is the probability "
                  "that the true ratio is higher than that, given the number of days, the skew and "
                  "the kurtosis (Bailey and Lopez de Prado, 2014). Ratios are daily, not annual. "
                  "The variance over tries is estimated from these runs as if they were "
                  "independent, so it is too small if they are similar. Return: "
                  f"{comparison.returns_description}.", "note"),
        table(["Run", "Group", "Seed", "Daily Sharpe", "Best by luck", "Deflated", "Days"], rows),
    )  # fmt: skip


def _add_runs(page: Page, comparison: Comparison) -> None:
    tables = [
        table(
            ["Run", "Group", "Seed", *columns.values()],
            [[run.id[:SHORT_ID], group.name, run.seed]
             + [Number(m, run.metrics[m], run.id) if m in run.metrics else "–" for m in columns]
             for group in comparison.groups for run in group.runs],
        )
        for columns in _metric_columns(comparison)
        if columns
    ]  # fmt: skip
    ids = table(["Run", "Name", "ID"], [[r.id[:SHORT_ID], r.name, r.id] for r in comparison.runs])
    page.section("All runs", *tables, collapsible("Full run IDs", ids))
