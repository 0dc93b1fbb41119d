"""HFSignalRecord: the quality of scores of intraday bars."""

from __future__ import annotations

from typing import Any, ClassVar

from qtorch.metrics.signal import (
    calc_ic,
    calc_long_short_prec,
    calc_long_short_return,
    mean_over_std,
)
from qtorch.record.base import Names, Record
from qtorch.record.signal import SignalRecord
from qtorch.record.signal_analysis import finite_metrics, ic_figures

_NAMES = ("ic", "ric", "long_pre", "short_pre", "long_short_r", "long_avg_r")


class HFSignalRecord(Record):
    """Evaluates `pred.pkl` against `label.pkl` bar by bar; writes to `hg_sig_analysis/`.

    Writes `ic`, `ric`, `long_pre`, `short_pre` (the shares of the top fifth that rise and of the
    bottom fifth that fall relative to the bar's mean), `long_short_r` and `long_avg_r`. Logs their
    means, ICIR, Rank ICIR and mean / std of the long-short return, none annualised. Corresponds to
    Qlib's HFSignalRecord, including the spelling of the folder.
    """

    artifact_path: ClassVar[str | None] = "hg_sig_analysis"
    depend_cls: ClassVar[type[Record] | None] = SignalRecord

    def generate(self) -> dict[str, Any]:
        """Compute, store and log; return the series."""
        self.check()
        score, label = (self.load(name).iloc[:, 0] for name in self._input_artifacts())
        ic, rank_ic = calc_ic(score, label)
        precision = calc_long_short_prec(score, label, is_alpha=True)
        long_short, average = calc_long_short_return(score, label)
        metrics = ic_figures(ic, rank_ic) | {
            "Long precision": precision[0].mean(),
            "Short precision": precision[1].mean(),
            "Long-Short Average Return": long_short.mean(),
            "Long-Short Average Sharpe": mean_over_std(long_short),
        }
        series = (ic, rank_ic, *precision, long_short, average)
        objects = {f"{n}.pkl": s for n, s in zip(_NAMES, series, strict=True)}
        self.recorder.log_batch(finite_metrics(metrics), step=0)
        self.save(**objects)
        return objects

    def list(self) -> Names:
        return [f"{name}.pkl" for name in _NAMES]

    def _input_artifacts(self) -> Names:
        return ["pred.pkl", "label.pkl"]
