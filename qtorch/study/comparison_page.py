"""The comparison of several runs as one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qtorch.record.page import Cell, Markup, Number, Page, facts, folded, paragraph, table
from qtorch.record.run_results import told_of_run
from qtorch.study.comparison import (
    SERIES,
    Comparison,
    RunGroup,
    compare_runs,
    differing,
)
from qtorch.study.comparison_chart import curves_chart, dots_chart
from qtorch.tracking.recorder import Recorder

PAGE = "comparison.html"
SHORT_ID = 8


def write_comparison(
    recorders: Sequence[Recorder], folder: str | Path, *, tries: int | None = None
) -> Path:
    """Compare runs (`compare_runs`) and write `comparison.html` and its PNGs into a folder."""
    compared = compare_runs(recorders, tries=tries)
    groups = len(compared.groups)
    title = f"Comparison of {len(compared.runs)} runs in {groups} group{'s' * (groups > 1)}"
    page = Page(Path(folder), title)
    told = told_of_run(recorders[0])
    common = {k: told[k] for k in ("Data", "Tested on") if k in told}
    page.add(f"<header>\n<h1>{title}</h1>", facts(common.items()), "</header>")
    _add_groups(page, compared)
    _add_curves(page, compared)
    _add_tests(page, compared)
    _add_sharpe(page, compared)
    _add_runs(page, compared)
    return page.write(PAGE)


def _columns(compared: Comparison) -> tuple[dict[str, str], dict[str, str]]:
    """`{metric: heading}` of the signal's and of the portfolio's metrics that any run has."""
    excess = f"{compared.runs[0].freq}.excess_return_with_cost"
    signal = {name: name for name in ("IC", "ICIR", "Rank IC", "Rank ICIR")}
    signal["Long-Short Ann Return"] = "Long-short, a year"
    held = {m for run in compared.runs for m in run.metrics}
    portfolio = {
        f"{excess}.annualized_return": "Excess return, a year",
        f"{excess}.information_ratio": "Information ratio",
        f"{excess}.max_drawdown": "Drawdown of the excess",
    }
    if held.isdisjoint(portfolio):  # no benchmark
        portfolio = {
            "report.annualized_return": "Return, a year",
            "report.sharpe_ratio": "Sharpe ratio",
            "report.max_drawdown": "Drawdown",
        }
    portfolio["report.turnover"] = "Turnover, a day"
    first, second = ({m: h for m, h in part.items() if m in held} for part in (signal, portfolio))
    return first, second


def _add_groups(page: Page, compared: Comparison) -> None:
    parts = _columns(compared)
    tables = [
        table(
            ["Group", "Runs", *columns.values()],
            [[g.name, str(len(g.runs)), *(_mean_cell(g, m) for m in columns)]
             for g in compared.groups],
        )
        for columns in parts
        if columns
    ]  # fmt: skip
    differ = differing(compared.groups)
    names = [group.name for group in compared.groups]
    page.section(
        "Groups",
        paragraph("Runs with equal parameters but for the seed are a group. Mean over its runs "
                  "± standard deviation (one run has none).", "note"),
        *tables,
        _dots(page, compared, parts[0] | parts[1]),
        folded("Parameters that differ", table(
            ["Parameter", *names], [[k, *v] for k, v in differ.items()], kind="wrap"))
        if differ else "",
    )  # fmt: skip


def _dots(page: Page, compared: Comparison, columns: dict[str, str]) -> str:
    returns = [m for m in columns if m.endswith(("annualized_return", "Ann Return"))]
    drawn = [m for m in ("IC", "Rank IC") if m in columns] + sorted(returns)[:1]
    values = {
        columns[m]: {g.name: [r.metrics[m] for r in g.runs if m in r.metrics]
                     for g in compared.groups}
        for m in drawn
    }  # fmt: skip
    if not values:
        return ""
    percent = [columns[m] for m in returns]
    says = f"{', '.join(values)} of each run, by group."
    return page.picture("by_run", dots_chart, values, percent=percent, says=says)


def _mean_cell(group: RunGroup, metric: str) -> Cell:
    mean, std = group.mean_and_std(metric)
    if mean != mean:
        return "–"
    first = Number(metric, mean, group.name).html()
    if std != std:
        return Markup(first)
    return Markup(f"{first} ± {Number(f'{metric}.std', std, group.name).html()}")


def _add_curves(page: Page, compared: Comparison) -> None:
    pictures = []
    for series, title, unit in (
        ("rank_ic", "Cumulative Rank IC", "sum of daily correlations"),
        ("returns", "Cumulative return", "% (sum of daily returns)"),
    ):
        tables = {g.name: g.by_run(series) for g in compared.groups}
        tables = {name: t for name, t in tables.items() if t.shape[1]}
        if tables:
            pictures.append(
                page.picture(f"cumulative_{series}", curves_chart, tables, title, unit,
                             percent=series == "returns", says=f"{title} by group.")
            )  # fmt: skip
    told = (
        f"Return: {compared.returns_of}. Line: mean of the runs; band: from the least to the most."
    )
    page.section("Through time", paragraph(told, "note"), *pictures)


def _add_tests(page: Page, compared: Comparison) -> None:
    if len(compared.groups) < 2:
        told = "All runs are of one group: there is nothing to test them against."
        page.section("Paired tests", paragraph(told, "missing"))
        return
    rows: list[Sequence[Cell]] = [
        [
            SERIES[t.series],
            f"{t.first} − {t.second}",
            Number(f"{t.series}.difference" if t.series != "returns" else "return",
                   t.test.mean, f"{t.first} − {t.second}"),
            Number("t", t.test.statistic, f"{t.first} − {t.second}"),
            Number(f"{t.series}.p_value", t.test.p_value, f"{t.first} − {t.second}"),
            Number(f"{t.series}.adjusted_p_value", t.adjusted, f"{t.first} − {t.second}"),
            f"{t.test.count:,}",
        ]
        for t in compared.tests
    ]  # fmt: skip
    lags = sorted({t.test.lags for t in compared.tests})
    page.section(
        "Paired tests",
        paragraph("Each group is the mean of its runs; the two are compared day by day. The "
                  "standard error is that of Newey and West for days that follow each other "
                  f"({', '.join(map(str, lags))} lags); p-values are two-sided, and adjusted for "
                  "the number of pairs by Holm. They speak of these days, not of other seeds.",
                  "note"),
        table(["Series", "Groups", "Mean difference", "t", "p", "p, adjusted", "Days"], rows),
    )  # fmt: skip


def _add_sharpe(page: Page, compared: Comparison) -> None:
    if not compared.sharpe:
        page.section("Deflated Sharpe ratio", paragraph(
            "No run holds a daily return. Add PortAnaRecord, or SigAnaRecord with "
            "ana_long_short=true, to the tasks' record.", "missing"))  # fmt: skip
        return
    where = {r.id: (g.name, r.seed) for g in compared.groups for r in g.runs}
    ranked = sorted(compared.sharpe.items(), key=lambda item: -item[1].sharpe)
    rows: list[Sequence[Cell]] = [
        [
            run[:SHORT_ID],
            where[run][0],
            where[run][1],
            Number("sharpe", sure.sharpe, run),
            Number("expected_best", sure.expected_best, run),
            Number("deflated_sharpe", sure.probability, run),
            f"{sure.count:,}",
        ]
        for run, sure in ranked
    ]
    tries = Number("tries", compared.tries).html()
    given = "the runs compared" if compared.tries == len(compared.runs) else "as stated"
    page.section(
        "Deflated Sharpe ratio",
        Markup(f'<p>Number of tries: <strong>{tries}</strong> ({given}). Where more strategies '
               "were tried than are shown, state it: <code>tries=N</code>.</p>"),
        paragraph("Of so many tries without any skill, the best would have the Sharpe ratio "
                  "“best by luck”. The deflated Sharpe ratio is the probability that the true "
                  "ratio lies above it, given the number of days, skew and kurtosis (Bailey and "
                  "Lopez de Prado, 2014). Ratios are of a day, not annual; the variance of the "
                  "tries is that of these runs, which are taken as independent: runs that resemble "
                  "each other make it small. Return: "
                  f"{compared.returns_of}.", "note"),
        table(["Run", "Group", "Seed", "Sharpe, a day", "Best by luck", "Deflated", "Days"], rows),
    )  # fmt: skip


def _add_runs(page: Page, compared: Comparison) -> None:
    tables = [
        table(
            ["Run", "Group", "Seed", *columns.values()],
            [[run.id[:SHORT_ID], group.name, run.seed]
             + [Number(m, run.metrics[m], run.id) if m in run.metrics else "–" for m in columns]
             for group in compared.groups for run in group.runs],
        )
        for columns in _columns(compared)
        if columns
    ]  # fmt: skip
    ids = table(["Run", "Name", "Id"], [[r.id[:SHORT_ID], r.name, r.id] for r in compared.runs])
    page.section("All runs", *tables, folded("Whole ids", ids))
