"""The sections of a run's report page; a note replaces a section whose artifacts are missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from qtorch.metrics.portfolio import Mode
from qtorch.record.report.page import (
    Cell,
    Number,
    Page,
    cards,
    collapsible,
    format_number,
    paragraph,
    table,
)
from qtorch.record.report.portfolio_charts import (
    concentration_chart,
    drawdown_chart,
    excess_chart,
    learning_chart,
    learning_curves,
    return_chart,
    turnover_chart,
)
from qtorch.record.report.results import (
    PREFIX,
    Histories,
    SignalTables,
    concentration_table,
    has_benchmark,
)
from qtorch.record.report.signal_charts import (
    autocorrelation_chart,
    decay_chart,
    monthly_chart,
    quantile_chart,
    rolling_ic_chart,
    spread_chart,
)

MetricValues = Mapping[str, float]
MODE_NOTES = {
    "sum": "Daily returns are summed, not compounded",
    "product": "Returns are compounded",
}


def missing_note(subject: str, artifact: str, record: str) -> str:
    """Return the note that replaces a section."""
    return paragraph(
        f"{subject}: the run has no {artifact}. Add {record} to the task's records.", "missing"
    )


def key_numbers(metrics: MetricValues, freq: str) -> str:
    """Return the cards at the top of the page, for the numbers that the run has."""
    excess = f"{freq}.excess_return_with_cost"
    kind = "deflated" if f"{PREFIX}deflated_sharpe" in metrics else "probabilistic"
    entries = (
        ("IC", "IC"),
        ("ICIR", "ICIR"),
        ("Rank IC", "Rank IC"),
        ("Rank ICIR", "Rank ICIR"),
        ("Top − bottom quantile, daily", f"{PREFIX}quantile_spread"),
        ("Annual return, with cost", f"{PREFIX}annualized_return"),
        ("Sharpe ratio, with cost", f"{PREFIX}sharpe_ratio"),
        ("Max. drawdown", f"{PREFIX}max_drawdown"),
        ("Annual excess return", f"{excess}.annualized_return"),
        ("Information ratio", f"{excess}.information_ratio"),
        ("Daily turnover", f"{PREFIX}turnover"),
        (f"{kind.capitalize()} Sharpe", f"{PREFIX}{kind}_sharpe"),
    )
    return cards([(name, Number(key, metrics[key])) for name, key in entries if key in metrics])


def add_portfolio(
    page: Page, report: pd.DataFrame, weight: pd.Series | None, metrics: MetricValues, mode: Mode
) -> None:
    """Add the sections on returns, drawdown, turnover, cost and concentration."""
    days = f"{len(report)} trading days"
    note = f"{MODE_NOTES[mode]}; costs are fractions of the account."
    if not has_benchmark(report):
        note += " The backtest has no benchmark."
    summary = _format_metrics(metrics, f"{PREFIX}annualized_return", f"{PREFIX}max_drawdown")
    page.section(
        "Return",
        paragraph(f"{note} {days}.", "note"),
        page.picture(
            "cumulative_return", return_chart, report, mode,
            alt_text=f"Cumulative return with and without cost over {days}. {summary}",
        ),
        page.picture(
            "excess_return", excess_chart, report, mode,
            alt_text=f"Cumulative return in excess of the benchmark over {days}.",
        ) if has_benchmark(report) else "",
        page.picture(
            "drawdown", drawdown_chart, report, mode, alt_text=f"Drawdown over {days}. {summary}"
        ),
        _numbers_table(metrics, RETURN_ROWS),
        _sharpe_note(metrics, has_benchmark(report)),
    )  # fmt: skip
    page.section(
        "Turnover and cost",
        paragraph("Turnover is the value bought and sold on a day, as a fraction of the account "
                  "on the previous day.", "note"),
        page.picture("turnover", turnover_chart, report,
                     alt_text="Daily turnover and cumulative cost."),
        _numbers_table(metrics, TRADE_ROWS),
    )  # fmt: skip
    if weight is None:
        page.section("Exposure and concentration", missing_note(
            "Exposure and concentration", "positions_normal_*.pkl", "PortAnaRecord"))  # fmt: skip
        return
    page.section(
        "Exposure and concentration",
        paragraph("The Herfindahl index is the sum of the squared weights of the invested part. "
                  "Its inverse, the effective number, is the number of equal positions with the "
                  "same concentration.", "note"),
        page.picture(
            "concentration", concentration_chart, concentration_table(weight, report),
            alt_text="Positions, largest weight, Herfindahl index, exposure and cash by day.",
        ),
        _numbers_table(metrics, HOLDING_ROWS),
    )  # fmt: skip


def add_ic(page: Page, ic: pd.Series, rank_ic: pd.Series, metrics: MetricValues) -> None:
    """Add the section on the IC over time and by month."""
    summary = _format_metrics(metrics, "IC", "Rank IC")
    page.section(
        "Information coefficient",
        paragraph("The correlation across instruments between a day's scores and the returns that "
                  "followed (IC), and between their ranks (Rank IC).", "note"),
        page.picture(
            "rolling_ic", rolling_ic_chart, ic, rank_ic,
            alt_text=f"Daily, rolling and cumulative IC over {ic.notna().sum()} days. {summary}",
        ),
        page.picture("monthly_ic", monthly_chart, ic, alt_text="Heat map of the mean IC by month."),
        _numbers_table(metrics, IC_ROWS),
    )  # fmt: skip


def add_signal(page: Page, tables: SignalTables, metrics: MetricValues) -> None:
    """Add the sections on IC by horizon, score quantiles and score autocorrelation."""
    decay = tables.decay
    page.section(
        "IC decay",
        paragraph("Horizon h compares the scores of a day with the label of h − 1 trading days "
                  "later. If the label is a one-day return, that is the return of the h-th day "
                  "only; h = 1 is the IC above. Longer horizons have fewer days. Error bars are "
                  "two standard errors, assuming independent days.", "note"),
        page.picture("ic_decay", decay_chart, decay, alt_text="IC and Rank IC by horizon."),
        table(
            ["Horizon, days", "IC", "Rank IC", "Days"],
            [[str(h), _cell(metrics, f"{PREFIX}ic_at_horizon.{h}"),
              _cell(metrics, f"{PREFIX}rank_ic_at_horizon.{h}"), f"{decay['days'][h]:,}"]
             for h in decay.index],
        ),
    )  # fmt: skip
    _add_quantiles(page, tables, metrics)
    if tables.autocorrelation:
        page.section(
            "Score autocorrelation",
            paragraph("Rank correlation between a day's scores and those of earlier days, across "
                      "instruments that have both. Near 1 the ranking hardly changes and causes "
                      "little trading.", "note"),
            page.picture(
                "score_autocorrelation", autocorrelation_chart, tables.autocorrelation,
                alt_text="Rank correlation of the scores with earlier scores, by lag and by day.",
            ),
            table(
                ["Lag, days", "Rank correlation"],
                [[str(lag), _cell(metrics, f"{PREFIX}score_autocorrelation.{lag}")]
                 for lag in tables.autocorrelation],
            ),
        )  # fmt: skip


def _add_quantiles(page: Page, tables: SignalTables, metrics: MetricValues) -> None:
    count = len(tables.quantiles.columns)
    if tables.quantiles.isna().all(axis=None):
        text = f"No day has {count} instruments with a score and a label, one per quantile."
        page.section("Returns by score quantile", paragraph(text, "missing"))
        return
    page.section(
        "Returns by score quantile",
        paragraph(f"Each day's instruments are split by score into {count} groups of equal size; "
                  "shown is the mean label of each, without cost. If a label spans several days, "
                  "the sums count overlapping days.", "note"),
        page.picture(
            "quantile_returns", quantile_chart, tables.quantiles,
            alt_text="Mean return by score quantile; cumulative returns minus the mean of all.",
        ),
        page.picture(
            "quantile_spread", spread_chart, tables.spread,
            alt_text="Return of the highest minus the lowest quantile, daily and cumulative.",
        ),
        table(
            ["Quantile", "Mean return"],
            [[_quantile_name(q, count), _cell(metrics, f"{PREFIX}quantile_return.{q}")]
             for q in range(1, count + 1)]
            + [["Highest − lowest", _cell(metrics, f"{PREFIX}quantile_spread")]],
        ),
    )  # fmt: skip


def add_training(page: Page, curves: Histories) -> None:
    """Add the learning curves if the training logged several epochs."""
    panels = learning_curves(curves)
    if not panels:
        text = "The training logged no metrics for two or more epochs (train/..., valid/...)."
        page.section("Training", paragraph(text, "missing"))
        return
    page.section(
        "Training",
        page.picture(
            "learning_curves", learning_chart, panels,
            alt_text="Learning curves: " + ", ".join(k for p in panels.values() for k in p),
        ),
    )  # fmt: skip


def add_metrics(page: Page, metrics: MetricValues, params: Mapping[str, str]) -> None:
    """Add all metrics and parameters of the run."""
    groups: dict[str, list[Sequence[Cell]]] = {}
    for name in sorted(metrics, key=_sort_key):
        groups.setdefault(_metric_group(name), []).append([name, Number(name, metrics[name])])
    tables = (table([group, ""], rows) for group, rows in groups.items())
    page.section(
        "All metrics",
        paragraph(f"The latest values of the {len(metrics)} metrics of the run, by their names in "
                  "MLflow.", "note"),
        f'<div class="columns">{"".join(tables)}</div>',
        collapsible("Parameters",
                    table(["Parameter", "Value"], sorted(params.items()), kind="wrap")),
    )  # fmt: skip


RETURN_ROWS = (
    ("Annual return, with cost", f"{PREFIX}annualized_return"),
    ("Annual return, without cost", f"{PREFIX}annualized_return_without_cost"),
    ("Annual return of the benchmark", f"{PREFIX}benchmark_annualized_return"),
    ("Total return of the account, compounded", f"{PREFIX}total_return"),
    ("Annual volatility", f"{PREFIX}annualized_volatility"),
    ("Annual Sharpe ratio", f"{PREFIX}sharpe_ratio"),
    ("Maximum drawdown", f"{PREFIX}max_drawdown"),
    ("Maximum drawdown of the benchmark", f"{PREFIX}benchmark_max_drawdown"),
    ("Probabilistic Sharpe ratio", f"{PREFIX}probabilistic_sharpe"),
    ("Deflated Sharpe ratio", f"{PREFIX}deflated_sharpe"),
)
TRADE_ROWS = (
    ("Turnover, daily mean", f"{PREFIX}turnover"),
    ("Annual cost", f"{PREFIX}annualized_cost"),
)
HOLDING_ROWS = (
    ("Positions", f"{PREFIX}num_positions"),
    ("Effective number", f"{PREFIX}effective_positions"),
    ("Herfindahl index", f"{PREFIX}herfindahl"),
    ("Largest weight", f"{PREFIX}largest_weight"),
    ("Share of cash", f"{PREFIX}cash_share"),
)
IC_ROWS = tuple((name, name) for name in ("IC", "ICIR", "Rank IC", "Rank ICIR"))
_GROUPS = {"train": "Training", "valid": "Training", "report": "Report", "system": "System"}


def _sharpe_note(metrics: MetricValues, bench: bool) -> str:
    """Explain the probability in the table, with the number of tries."""
    quantity = "return after cost" + (", in excess of the benchmark," if bench else "")
    source = "(Bailey and Lopez de Prado, 2012 and 2014)"
    if f"{PREFIX}deflated_sharpe" not in metrics:
        return paragraph(f"Probabilistic Sharpe ratio: the probability that the true Sharpe ratio "
                         f"of the {quantity} is above 0 {source}. It assumes that no other "
                         "strategy was tried.", "note")  # fmt: skip
    tries = Number(f"{PREFIX}tries", metrics[f"{PREFIX}tries"]).html()
    return (f'<p class="note">Deflated Sharpe ratio: the probability that the true Sharpe ratio '
            f"of the {quantity} is above what the best of {tries} strategies without skill would "
            f"have by luck {source}.</p>")  # fmt: skip


def _numbers_table(metrics: MetricValues, rows: Sequence[tuple[str, str]]) -> str:
    table_rows: list[Sequence[Cell]] = [
        [name, Number(key, metrics[key])] for name, key in rows if key in metrics
    ]
    return (
        table(["Mean over days" if rows is HOLDING_ROWS else "", ""], table_rows)
        if table_rows
        else ""
    )


def _cell(metrics: MetricValues, name: str) -> Cell:
    return Number(name, metrics[name]) if name in metrics else "–"


def _format_metrics(metrics: MetricValues, *names: str) -> str:
    parts = (
        f"{n.removeprefix(PREFIX)} {format_number(metrics[n], n)}" for n in names if n in metrics
    )
    return ", ".join(parts)


def _quantile_name(quantile: int, count: int) -> str:
    return (
        f"{quantile}{' (lowest)' if quantile == 1 else ' (highest)' if quantile == count else ''}"
    )


def _metric_group(name: str) -> str:
    """Return the table that a metric belongs to, by the beginning of its name."""
    if "/" in name:
        return _GROUPS.get(name.partition("/")[0], "Others")
    if name.startswith(PREFIX):
        return "Report"
    if "." not in name:
        return "Signal" if "IC" in name or "Long" in name else "Others"
    return "Signal by segment" if "IC" in name else "Portfolio"


def _sort_key(name: str) -> tuple[int, str, list[int], str]:
    groups = ("Signal", "Signal by segment", "Portfolio", "Report", "Training", "Others", "System")
    stem, _, last = name.rpartition(".")
    number = [int(last)] if last.isdigit() else []
    return groups.index(_metric_group(name)), stem if number else name, number, name
