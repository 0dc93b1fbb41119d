"""ReportRecord: a self-contained HTML page about a run, for a portfolio manager."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import pandas as pd

from qtorch.core.dates import name_bars
from qtorch.core.errors import ConfigError, check_name
from qtorch.metrics.risk import MODES, Mode
from qtorch.metrics.signal import HORIZONS
from qtorch.record.base import Names, Record
from qtorch.record.report import portfolio_charts, signal_charts, training_charts
from qtorch.record.report.page import Page
from qtorch.record.report.results import (
    PREFIX,
    RunResults,
    SignalTables,
    concentration_table,
    has_benchmark,
    log_numbers,
    model_name,
    portfolio_numbers,
    run_description,
    run_results,
    signal_numbers,
    signal_tables,
    training_histories,
)
from qtorch.tracking.recorder import Recorder

log = logging.getLogger(__name__)

PAGE = "report.html"
LAGS = (1, 2, 3, 5, 10, 20)  # days between the scores of the autocorrelation


class ReportRecord(Record):
    """Writes `report/report.html` and its charts as PNG files, and logs its numbers as `report.*`.

    Put it last in the task: it shows what the earlier records stored (`pred.pkl`, `label.pkl`,
    `sig_analysis/`, `portfolio_analysis/`), and for anything missing names the record to add.
    Every number on the page is a metric of the run. `mode` selects whether returns are summed or
    compounded ("sum", "product"), as in `risk_analysis`. `tries` is the number of strategies that
    this one was selected from; above 1 the page shows the deflated Sharpe ratio. `label_col`
    selects one of several label columns. `horizons` and `lags` count bars, which are
    trading days for daily scores.
    """

    artifact_path: ClassVar[str | None] = "report"

    def __init__(
        self,
        recorder: Recorder | None = None,
        *,
        mode: Mode = "sum",
        tries: int = 1,
        num_quantiles: int = 5,
        horizons: Sequence[int] = HORIZONS,
        lags: Sequence[int] = LAGS,
        label_col: int = 0,
    ) -> None:
        super().__init__(recorder)
        check_name("mode of the report", mode, MODES)
        if tries < 1:
            raise ConfigError(
                f"tries={tries}: expected the number of strategies tried, at least 1."
            )
        self.mode: Mode = mode
        self.tries = tries
        self.num_quantiles = num_quantiles
        self.horizons = horizons
        self.lags = lags
        self.label_col = label_col

    def generate(self) -> dict[str, float]:
        """Compute and log the numbers, write the page, and return the numbers."""
        recorder = self.recorder
        results = run_results(recorder, self.label_col)
        tables, numbers = self._compute_numbers(results)
        log_numbers(recorder, numbers)
        with tempfile.TemporaryDirectory() as folder:
            page = self._write_page(Path(folder), results, tables, recorder.list_metrics())
            size = page.stat().st_size
            recorder.save_objects(folder, artifact_path=self.artifact_path)
        log.info("saved report to %s (%d kB)", self.get_path(PAGE), size // 1000)
        return numbers

    def write(self, folder: Path) -> Path:
        """Write the page and its charts to a folder and return the page; the run stays as it is."""
        results = run_results(self.recorder, self.label_col)
        tables, numbers = self._compute_numbers(results)
        stored = self.recorder.list_metrics()
        metrics = {name: v for name, v in stored.items() if not name.startswith(PREFIX)}
        return self._write_page(folder, results, tables, metrics | numbers)

    def list(self) -> Names:
        return [PAGE]

    def _compute_numbers(self, results: RunResults) -> tuple[SignalTables | None, dict[str, float]]:
        """Return the tables of the signal, and the numbers that are logged as `report.*`.

        Nothing is computed from results that the run does not have.
        """
        tables: SignalTables | None = None
        numbers: dict[str, float] = {}
        if results.score is not None and results.label is not None:
            tables = signal_tables(
                results.score, results.label, self.horizons, self.lags, self.num_quantiles
            )
            numbers |= signal_numbers(tables)
        if results.report is not None:
            numbers |= portfolio_numbers(
                results.report,
                results.weight,
                results.freq,
                self.mode,
                self.tries,
                results.periods,
            )
        return tables, numbers

    def _write_page(
        self,
        folder: Path,
        results: RunResults,
        tables: SignalTables | None,
        metrics: Mapping[str, float],
    ) -> Path:
        recorder = results.recorder
        params = recorder.list_params()
        histories = training_histories(recorder)
        panels = training_charts.learning_curves(histories)
        page = Page(folder)
        if results.report is not None:
            self._draw_portfolio(page, results.report, results.weight)
        if results.has_ic:
            page.draw("rolling_ic", signal_charts.rolling_ic_chart, results.ic, results.rank_ic)
            page.draw("monthly_ic", signal_charts.monthly_chart, results.ic)
        if tables is not None:
            self._draw_signal(page, tables)
        if panels:
            page.draw("learning_curves", training_charts.learning_chart, panels)
        return page.write(
            PAGE,
            "run.html.j2",
            title=f"{model_name(params)}: report of run {recorder.id}",
            facts=run_description(recorder),
            model=model_name(params),
            results=results,
            return_bars=name_bars(results.freq),
            has_benchmark=results.report is not None and has_benchmark(results.report),
            mode=self.mode,
            tables=tables,
            curves=[name for panel in panels.values() for name in panel],
            has_epoch=any(histories.values()),
            metrics=metrics,
            metric_groups=group_metrics(metrics),
            params=params,
        )

    def _draw_portfolio(self, page: Page, report: pd.DataFrame, weight: pd.Series | None) -> None:
        page.draw("cumulative_return", portfolio_charts.return_chart, report, self.mode)
        if has_benchmark(report):
            page.draw("excess_return", portfolio_charts.excess_chart, report, self.mode)
        page.draw("drawdown", portfolio_charts.drawdown_chart, report, self.mode)
        page.draw("turnover", portfolio_charts.turnover_chart, report)
        if weight is not None:
            page.draw(
                "concentration",
                portfolio_charts.concentration_chart,
                concentration_table(weight, report),
            )

    def _draw_signal(self, page: Page, tables: SignalTables) -> None:
        page.draw("ic_decay", signal_charts.decay_chart, tables.decay, bars=tables.bars)
        if tables.has_quantiles:
            page.draw("quantile_returns", signal_charts.quantile_chart, tables.quantiles)
            page.draw("quantile_spread", signal_charts.spread_chart, tables.spread)
        if tables.autocorrelation:
            page.draw(
                "score_autocorrelation", signal_charts.autocorrelation_chart, tables.autocorrelation
            )


METRIC_GROUPS = (
    "Signal",
    "Signal by segment",
    "Portfolio",
    "Report",
    "Training",
    "Others",
    "System",
)


def group_metrics(names: Iterable[str]) -> dict[str, list[str]]:
    """Sort metric names into the tables of the page.

    Names that end with a number are sorted by it: `ic_at_horizon.2` before `ic_at_horizon.10`.
    """
    groups: dict[str, list[str]] = {group: [] for group in METRIC_GROUPS}
    for name in sorted(names, key=_sort_key):
        groups[_metric_group(name)].append(name)
    return {group: members for group, members in groups.items() if members}


def _metric_group(name: str) -> str:
    """Return the table that a metric belongs to, by the beginning of its name."""
    if "/" in name:
        prefixes = {"train": "Training", "valid": "Training", "system": "System"}
        return prefixes.get(name.partition("/")[0], "Others")
    if name.startswith(PREFIX):
        return "Report"
    # What remains are the metrics of the other records, such as "Rank IC" of SigAnaRecord,
    # "valid.IC" of SegmentICRecord and "1day.excess_return_with_cost.std" of PortAnaRecord.
    if "." not in name:
        return "Signal" if "IC" in name or "Long" in name else "Others"
    return "Signal by segment" if "IC" in name else "Portfolio"


def _sort_key(name: str) -> tuple[str, list[int], str]:
    """Return the name without the number at its end, the number if it has one, and the name."""
    stem, _, last = name.rpartition(".")
    number = [int(last)] if last.isdigit() else []
    return stem if number else name, number, name
