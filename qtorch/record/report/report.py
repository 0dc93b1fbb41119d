"""ReportRecord: a self-contained HTML page about a run, for a portfolio manager."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import ClassVar

from qtorch.core.errors import ConfigError, unknown_name
from qtorch.metrics.portfolio import MODES, Mode
from qtorch.metrics.signal import HORIZONS
from qtorch.record.base import Names, Record
from qtorch.record.report.page import Page, facts
from qtorch.record.report.results import (
    RunResults,
    SignalTables,
    log_numbers,
    model_name,
    portfolio_numbers,
    run_description,
    run_results,
    signal_numbers,
    signal_tables,
    training_histories,
)
from qtorch.record.report.sections import (
    add_ic,
    add_metrics,
    add_portfolio,
    add_signal,
    add_training,
    key_numbers,
    missing_note,
)
from qtorch.tracking.recorder import Recorder

log = logging.getLogger(__name__)

PAGE = "report.html"
LAGS = (1, 2, 3, 5, 10, 20)


class ReportRecord(Record):
    """Writes `report/report.html` and its charts as PNG files, and logs its numbers as `report.*`.

    Put it last in the task: it shows what the earlier records stored (`pred.pkl`, `label.pkl`,
    `sig_analysis/`, `portfolio_analysis/`), and for anything missing names the record to add.
    Every number on the page is a metric of the run. `mode` selects whether returns are summed or
    compounded ("sum", "product"), as in `risk_analysis`. `tries` is the number of strategies that
    this one was selected from; above 1 the page shows the deflated Sharpe ratio. `label_col`
    selects one of several label columns. `horizons` and `lags` are in trading days.
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
        if mode not in MODES:
            raise ConfigError(unknown_name("mode of the report", str(mode), MODES))
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
        tables, numbers = self._numbers(results)
        log_numbers(recorder, numbers)
        with tempfile.TemporaryDirectory() as folder:
            page = self._page(Path(folder), results, tables)
            size = page.write(PAGE).stat().st_size
            recorder.save_objects(folder, artifact_path=self.artifact_path)
        log.info("saved report to %s (%d kB)", self.get_path(PAGE), size // 1000)
        return numbers

    def list(self) -> Names:
        return [PAGE]

    def _numbers(self, results: RunResults) -> tuple[SignalTables | None, dict[str, float]]:
        tables: SignalTables | None = None
        numbers: dict[str, float] = {}
        if results.score is not None and results.label is not None:
            tables = signal_tables(
                results.score, results.label, self.horizons, self.lags, self.num_quantiles
            )
            numbers |= signal_numbers(tables)
        if results.report is not None:
            numbers |= portfolio_numbers(
                results.report, results.weight, results.freq, self.mode, self.tries
            )
        return tables, numbers

    def _page(self, folder: Path, results: RunResults, tables: SignalTables | None) -> Page:
        recorder = results.recorder
        metrics, params = recorder.list_metrics(), recorder.list_params()
        title = f"{model_name(params)}: report of run {recorder.id}"
        page = Page(folder, title)
        page.add(
            f"<header>\n<h1>{escape(model_name(params))}: signal and portfolio</h1>",
            facts(run_description(recorder).items()),
            key_numbers(metrics, results.freq),
            "</header>",
        )
        if results.report is not None:
            add_portfolio(page, results.report, results.weight, metrics, self.mode)
        else:
            page.section("Return", missing_note("Return, drawdown, turnover, concentration",
                         "portfolio_analysis/report_normal_1day.pkl", "PortAnaRecord"))  # fmt: skip
        ic, rank_ic = results.ic, results.rank_ic
        if ic is not None and rank_ic is not None and ic.notna().any():
            add_ic(page, ic, rank_ic, metrics)
        else:
            page.section("Information coefficient", missing_note("IC through time",
                         "sig_analysis/ic.pkl and ric.pkl", "SigAnaRecord"))  # fmt: skip
        if tables is not None:
            add_signal(page, tables, metrics)
        else:
            page.section("Signal", missing_note("IC decay, quantiles, autocorrelation",
                         "pred.pkl and label.pkl", "SignalRecord"))  # fmt: skip
        add_training(page, training_histories(recorder))
        add_metrics(page, metrics, params)
        return page
