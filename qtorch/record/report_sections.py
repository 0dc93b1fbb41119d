"""The sections of a run's page, each of what the run holds, or a sentence on what is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from qtorch.metrics.curve import Mode
from qtorch.record.learning_chart import learning_chart, learning_curves
from qtorch.record.page import Cell, Number, Page, cards, folded, paragraph, shown, table
from qtorch.record.portfolio_chart import (
    concentration_chart,
    drawdown_chart,
    excess_chart,
    return_chart,
    turnover_chart,
)
from qtorch.record.report_numbers import PREFIX, SignalTables, spread_of
from qtorch.record.run_results import Histories, has_benchmark
from qtorch.record.signal_chart import (
    autocorrelation_chart,
    decay_chart,
    monthly_chart,
    quantile_chart,
    rolling_ic_chart,
    spread_chart,
)

Metrics = Mapping[str, float]
WAYS = {"sum": "Daily returns are added up, not compounded", "product": "Returns are compounded"}


def missing(what: str, artifact: str, record: str) -> str:
    """The sentence in the place of a section."""
    return paragraph(
        f"{what}: the run holds no {artifact}. Add {record} to the task's record.", "missing"
    )


def key_numbers(metrics: Metrics, freq: str) -> str:
    """The cards on top: those of the numbers that the run has."""
    excess = f"{freq}.excess_return_with_cost"
    sure = "deflated" if f"{PREFIX}deflated_sharpe" in metrics else "probabilistic"
    wanted = (
        ("IC", "IC"),
        ("ICIR", "ICIR"),
        ("Rank IC", "Rank IC"),
        ("Rank ICIR", "Rank ICIR"),
        ("Top − bottom quantile, a day", f"{PREFIX}quantile_spread"),
        ("Annual return, with cost", f"{PREFIX}annualized_return"),
        ("Sharpe ratio, with cost", f"{PREFIX}sharpe_ratio"),
        ("Max. drawdown", f"{PREFIX}max_drawdown"),
        ("Annual excess return", f"{excess}.annualized_return"),
        ("Information ratio", f"{excess}.information_ratio"),
        ("Turnover, a day", f"{PREFIX}turnover"),
        (f"{sure.capitalize()} Sharpe", f"{PREFIX}{sure}_sharpe"),
    )
    return cards([(name, Number(key, metrics[key])) for name, key in wanted if key in metrics])


def add_portfolio(
    page: Page, report: pd.DataFrame, weight: pd.Series | None, metrics: Metrics, mode: Mode
) -> None:
    """Returns, drawdown, turnover and cost, concentration."""
    days = f"{len(report)} trading days"
    way = f"{WAYS[mode]}; cost is what the trades paid, as a share of the account."
    if not has_benchmark(report):
        way += " The backtest was given no benchmark."
    told = _told(metrics, f"{PREFIX}annualized_return", f"{PREFIX}max_drawdown")
    page.section(
        "Return",
        paragraph(f"{way} {days}.", "note"),
        page.picture(
            "cumulative_return", return_chart, report, mode,
            says=f"Cumulative return with and without cost over {days}. {told}",
        ),
        page.picture(
            "excess_return", excess_chart, report, mode,
            says=f"Cumulative return in excess of the benchmark over {days}.",
        ) if has_benchmark(report) else "",
        page.picture(
            "drawdown", drawdown_chart, report, mode, says=f"Drawdown over {days}. {told}"
        ),
        _numbers_table(metrics, RETURN_ROWS),
        _sharpe_words(metrics, has_benchmark(report)),
    )  # fmt: skip
    page.section(
        "Turnover and cost",
        paragraph("Turnover is the value bought and sold in a day, as a share of the account of "
                  "the day before.", "note"),
        page.picture("turnover", turnover_chart, report, says="Turnover by day, cumulative cost."),
        _numbers_table(metrics, TRADE_ROWS),
    )  # fmt: skip
    if weight is None:
        page.section("Exposure and concentration", missing(
            "Exposure and concentration", "positions_normal_*.pkl", "PortAnaRecord"))  # fmt: skip
        return
    page.section(
        "Exposure and concentration",
        paragraph("The Herfindahl index is the sum of the squared shares of what is invested; its "
                  "inverse, the effective number, is how many equal positions would be as "
                  "concentrated.", "note"),
        page.picture(
            "concentration", concentration_chart, spread_of(weight, report),
            says="Number of positions, largest weight, Herfindahl index, exposure and cash by day.",
        ),
        _numbers_table(metrics, HOLDING_ROWS),
    )  # fmt: skip


def add_ic(page: Page, ic: pd.Series, rank_ic: pd.Series, metrics: Metrics) -> None:
    """IC through time and by month."""
    told = _told(metrics, "IC", "Rank IC")
    page.section(
        "Information coefficient",
        paragraph("The correlation of a day's scores with the returns that followed, over its "
                  "instruments (IC), and that of their ranks (Rank IC).", "note"),
        page.picture(
            "rolling_ic", rolling_ic_chart, ic, rank_ic,
            says=f"Daily IC, rolling means and sums over {ic.notna().sum()} days. {told}",
        ),
        page.picture("monthly_ic", monthly_chart, ic, says="Heat map of the mean IC by month."),
        _numbers_table(metrics, IC_ROWS),
    )  # fmt: skip


def add_signal(page: Page, tables: SignalTables, metrics: Metrics) -> None:
    """IC by horizon, quantiles, autocorrelation: what scores and labels tell."""
    decay = tables.decay
    page.section(
        "IC decay",
        paragraph("Horizon h: the scores of a day against the label of h − 1 trading days later. "
                  "Where the label is the return of one day, that is the h-th day that the scores "
                  "could earn, alone; h = 1 is the IC above. The days are fewer for a longer "
                  "horizon. Bars are two standard errors, days taken as independent.", "note"),
        page.picture("ic_decay", decay_chart, decay, says="IC and Rank IC by horizon."),
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
            paragraph("Rank correlation of a day's scores with those of some days before, over "
                      "the instruments that have both: near 1 the ranking hardly changes, and "
                      "trades little.", "note"),
            page.picture(
                "score_autocorrelation", autocorrelation_chart, tables.autocorrelation,
                says="Rank correlation of the scores with earlier ones, by lag and by day.",
            ),
            table(
                ["Lag, days", "Rank correlation"],
                [[str(lag), _cell(metrics, f"{PREFIX}score_autocorrelation.{lag}")]
                 for lag in tables.autocorrelation],
            ),
        )  # fmt: skip


def _add_quantiles(page: Page, tables: SignalTables, metrics: Metrics) -> None:
    count = len(tables.quantiles.columns)
    if tables.quantiles.isna().all(axis=None):
        told = f"No day has {count} instruments with score and label, one for each quantile."
        page.section("Returns by score quantile", paragraph(told, "missing"))
        return
    page.section(
        "Returns by score quantile",
        paragraph(f"Each day's instruments in {count} groups of equal size by score; the mean "
                  "label of each, without cost. Where the label is of more than one day, the sums "
                  "count days that overlap.", "note"),
        page.picture(
            "quantile_returns", quantile_chart, tables.quantiles,
            says="Mean return by score quantile; cumulative returns less the mean of all.",
        ),
        page.picture(
            "quantile_spread", spread_chart, tables.spread,
            says="Return of the highest less the lowest quantile, by day and cumulative.",
        ),
        table(
            ["Quantile", "Mean return"],
            [[_end(q, count), _cell(metrics, f"{PREFIX}quantile_return.{q}")]
             for q in range(1, count + 1)]
            + [["Highest − lowest", _cell(metrics, f"{PREFIX}quantile_spread")]],
        ),
    )  # fmt: skip


def add_training(page: Page, curves: Histories) -> None:
    """The learning curves, where the training logged several epochs."""
    panels = learning_curves(curves)
    if not panels:
        text = "The training logged no metrics of two epochs or more (train/..., valid/...)."
        page.section("Training", paragraph(text, "missing"))
        return
    page.section(
        "Training",
        page.picture(
            "learning_curves", learning_chart, panels,
            says="Learning curves: " + ", ".join(k for p in panels.values() for k in p),
        ),
    )  # fmt: skip


def add_metrics(page: Page, metrics: Metrics, params: Mapping[str, str]) -> None:
    """All metrics of the run by name, and its params."""
    groups: dict[str, list[Sequence[Cell]]] = {}
    for name in sorted(metrics, key=_order):
        groups.setdefault(_group(name), []).append([name, Number(name, metrics[name])])
    tables = (table([group, ""], rows) for group, rows in groups.items())
    page.section(
        "All metrics",
        paragraph(f"The {len(metrics)} metrics of the run by their names in MLflow, the newest "
                  "value of each.", "note"),
        f'<div class="columns">{"".join(tables)}</div>',
        folded("Parameters", table(["Parameter", "Value"], sorted(params.items()), kind="wrap")),
    )  # fmt: skip


RETURN_ROWS = (
    ("Annual return, with cost", f"{PREFIX}annualized_return"),
    ("Annual return, without cost", f"{PREFIX}annualized_return_without_cost"),
    ("Annual return of the benchmark", f"{PREFIX}benchmark_annualized_return"),
    ("Total return of the account, compounded", f"{PREFIX}total_return"),
    ("Annual volatility", f"{PREFIX}annualized_volatility"),
    ("Sharpe ratio, annual", f"{PREFIX}sharpe_ratio"),
    ("Maximum drawdown", f"{PREFIX}max_drawdown"),
    ("Maximum drawdown of the benchmark", f"{PREFIX}benchmark_max_drawdown"),
    ("Probabilistic Sharpe ratio", f"{PREFIX}probabilistic_sharpe"),
    ("Deflated Sharpe ratio", f"{PREFIX}deflated_sharpe"),
)
TRADE_ROWS = (
    ("Turnover, mean of a day", f"{PREFIX}turnover"),
    ("Cost, a year", f"{PREFIX}annualized_cost"),
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


def _sharpe_words(metrics: Metrics, bench: bool) -> str:
    """What the probability of the table means, with the number of tries."""
    of = "return after cost" + (", in excess of the benchmark," if bench else "")
    source = "(Bailey and Lopez de Prado, 2012 and 2014)"
    if f"{PREFIX}deflated_sharpe" not in metrics:
        return paragraph(f"Probabilistic Sharpe ratio: the probability that the true Sharpe ratio "
                         f"of the {of} is above 0 {source}. It takes the strategy for the only "
                         "one that was tried.", "note")  # fmt: skip
    tries = Number(f"{PREFIX}tries", metrics[f"{PREFIX}tries"]).html()
    return (f'<p class="note">Deflated Sharpe ratio: the probability that the true Sharpe ratio '
            f"of the {of} is above what the best of {tries} tries without skill would have by "
            f"luck {source}.</p>")  # fmt: skip


def _numbers_table(metrics: Metrics, rows: Sequence[tuple[str, str]]) -> str:
    held: list[Sequence[Cell]] = [
        [name, Number(key, metrics[key])] for name, key in rows if key in metrics
    ]
    return table(["Mean over days" if rows is HOLDING_ROWS else "", ""], held) if held else ""


def _cell(metrics: Metrics, name: str) -> Cell:
    return Number(name, metrics[name]) if name in metrics else "–"


def _told(metrics: Metrics, *names: str) -> str:
    told = (f"{n.removeprefix(PREFIX)} {shown(metrics[n], n)}" for n in names if n in metrics)
    return ", ".join(told)


def _end(quantile: int, count: int) -> str:
    return (
        f"{quantile}{' (lowest)' if quantile == 1 else ' (highest)' if quantile == count else ''}"
    )


def _group(name: str) -> str:
    """The table that a metric stands in, by how its name begins."""
    if "/" in name:
        return _GROUPS.get(name.partition("/")[0], "Others")
    if name.startswith(PREFIX):
        return "Report"
    if "." not in name:
        return "Signal" if "IC" in name or "Long" in name else "Others"
    return "Signal by segment" if "IC" in name else "Portfolio"


def _order(name: str) -> tuple[int, str, list[int], str]:
    groups = ("Signal", "Signal by segment", "Portfolio", "Report", "Training", "Others", "System")
    stem, _, last = name.rpartition(".")
    number = [int(last)] if last.isdigit() else []
    return groups.index(_group(name)), stem if number else name, number, name
