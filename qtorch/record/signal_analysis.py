"""SigAnaRecord: daily IC, Rank IC and long-short returns of the stored scores, with a chart."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd

from qtorch.core.errors import RecordError
from qtorch.metrics.signal import (
    annual_return,
    annual_sharpe,
    calc_ic,
    calc_long_short_return,
    mean_over_std,
)
from qtorch.record.base import Names, Record
from qtorch.record.ic_chart import ic_chart
from qtorch.record.signal import SignalRecord
from qtorch.tracking.recorder import Recorder

log = logging.getLogger(__name__)

CHART = "ic.png"


class SigAnaRecord(Record):
    """Evaluates `pred.pkl` against `label.pkl`; writes to `sig_analysis/` and logs metrics.

    Writes `ic.pkl`, `ric.pkl` (Series by day) and the chart `ic.png`; with `ana_long_short` also
    `long_short_r.pkl` and `long_avg_r.pkl`. Logs IC, ICIR, Rank IC, Rank ICIR, and with
    `ana_long_short` the annual return (mean x `ann_scaler`) and Sharpe ratio of both series.
    `label_col` selects one of several label columns; `skip_existing` skips the work if the
    artifacts exist. Corresponds to Qlib's SigAnaRecord; a missing dependency is an error here.
    """

    artifact_path: ClassVar[str | None] = "sig_analysis"
    depend_cls: ClassVar[type[Record] | None] = SignalRecord
    needs_cross_section: ClassVar[bool] = True

    def __init__(
        self,
        recorder: Recorder | None = None,
        ana_long_short: bool = False,
        ann_scaler: float = 252,
        label_col: int = 0,
        skip_existing: bool = False,
    ) -> None:
        super().__init__(recorder)
        self.ana_long_short = ana_long_short
        self.ann_scaler = ann_scaler
        self.label_col = label_col
        self.skip_existing = skip_existing

    def generate(self) -> dict[str, pd.Series] | None:
        """Compute, store and log; return the series, or None if skipped."""
        if self.skip_existing and all(self._has_artifact(self.get_path(n)) for n in self.list()):
            log.info("skipped sig_analysis: its artifacts exist")
            return None
        self.check()
        score, label = self.load("pred.pkl").iloc[:, 0], self._label()
        ic, rank_ic = calc_ic(score, label)
        if ic.isna().all():
            raise RecordError(
                f"the IC is undefined on all {len(ic)} days: no day has two instruments with "
                "different scores and labels. Use a universe of several instruments."
            )
        metrics = ic_figures(ic, rank_ic)
        series = {"ic.pkl": ic, "ric.pkl": rank_ic}
        if self.ana_long_short:
            returns = calc_long_short_return(score, label)
            series |= dict(zip(("long_short_r.pkl", "long_avg_r.pkl"), returns, strict=True))
            for name, daily in zip(("Long-Short", "Long-Avg"), returns, strict=True):
                metrics[f"{name} Ann Return"] = annual_return(daily, self.ann_scaler)
                metrics[f"{name} Ann Sharpe"] = annual_sharpe(daily, self.ann_scaler)
        self.recorder.log_batch(finite_metrics(metrics), step=0)
        self.save(**series)
        self._save_chart(ic, rank_ic)
        return series

    def list(self) -> Names:
        long_short = ["long_short_r.pkl", "long_avg_r.pkl"] if self.ana_long_short else []
        return ["ic.pkl", "ric.pkl", *long_short]

    def _input_artifacts(self) -> Names:
        return ["pred.pkl", "label.pkl"]

    def _label(self) -> pd.Series:
        label = self.load("label.pkl")
        if not -label.shape[1] <= self.label_col < label.shape[1]:
            raise RecordError(
                f"SigAnaRecord: label_col={self.label_col}, but label.pkl has {label.shape[1]} "
                f"columns: {list(map(str, label.columns))}."
            )
        column: pd.Series = label.iloc[:, self.label_col]
        return column

    def _save_chart(self, ic: pd.Series, rank_ic: pd.Series) -> None:
        figure = ic_chart(ic, rank_ic)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, CHART)
            figure.savefig(path, dpi=130)
            self.recorder.log_artifact(str(path), artifact_path=self.artifact_path)


def ic_figures(ic: pd.Series, rank_ic: pd.Series) -> dict[str, float]:
    """Return IC and Rank IC as means over days, and their mean / std (ddof 1), not annualised."""
    return {
        "IC": float(ic.mean()),
        "ICIR": mean_over_std(ic),
        "Rank IC": float(rank_ic.mean()),
        "Rank ICIR": mean_over_std(rank_ic),
    }


def finite_metrics(metrics: dict[str, Any]) -> dict[str, float]:
    """Drop undefined metrics (one day, one instrument) with a warning that names them."""
    undefined_names = [k for k, v in metrics.items() if pd.isna(v)]
    if undefined_names:
        log.warning(
            "undefined and not logged: %s (at least two days with two instruments are needed)",
            ", ".join(undefined_names),
        )
    return {k: float(v) for k, v in metrics.items() if k not in undefined_names}
