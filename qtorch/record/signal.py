"""Records of a signal: its scores and label, their correlation (IC) and long-short returns."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import pandas as pd

from qtorch.core.errors import ConfigError, LoadObjectError, RecordError, check_name
from qtorch.core.session import get_region
from qtorch.data.dataset.samples import require_segment
from qtorch.metrics.risk import periods_per_year
from qtorch.metrics.signal import (
    annual_return,
    annual_sharpe,
    calc_ic,
    calc_long_short_prec,
    calc_long_short_return,
    mean_over_std,
)
from qtorch.model.nonfinite import describe_nonfinite
from qtorch.record.base import Names, Record
from qtorch.record.report.signal_charts import ic_chart
from qtorch.tracking.recorder import Recorder

log = logging.getLogger(__name__)

Segments: TypeAlias = Sequence[str] | Mapping[str, str | slice]

SCORE = "score"
TEST = "test"
USUAL_SEGMENTS = ("train", "valid", TEST)
CHART = "ic.png"
_HF_SERIES = ("ic", "ric", "long_pre", "short_pre", "long_short_r", "long_avg_r")


class SignalRecord(Record):
    """Writes `pred.pkl` (column `score`) and `label.pkl` (raw label) of the test segment.

    Both are frames indexed by (datetime, instrument). Corresponds to Qlib's SignalRecord.
    """

    def __init__(
        self, model: Any = None, dataset: Any = None, recorder: Recorder | None = None
    ) -> None:
        super().__init__(recorder)
        self.model = model
        self.dataset = dataset

    def check_segment_names(self, names: Collection[str]) -> None:
        require_segment(TEST, names, f"of which {type(self).__name__} stores the scores")

    def generate(self) -> pd.DataFrame:
        """Predict the test segment; store and return the scores."""
        for name in ("model", "dataset"):
            if getattr(self, name) is None:
                raise RecordError(
                    f"SignalRecord needs a {name}; set '{name}: <{name.upper()}>' in the task's "
                    "record, or pass the object itself."
                )
        pred = predict_frame(self.model, self.dataset)
        label = raw_label(self.dataset)
        self.save(**{"pred.pkl": pred, "label.pkl": label})
        log.info("saved %d scores of the test segment to pred.pkl", len(pred))
        return pred

    def list(self) -> Names:
        return ["pred.pkl", "label.pkl"]


def predict_frame(model: Any, dataset: Any, *segment: Any) -> pd.DataFrame:
    """Return a model's scores as a frame, with a warning if some are NaN or infinite."""
    scores = as_frame(model.predict(dataset, *segment))
    description = describe_nonfinite(scores)
    if description is not None:
        log.warning("%s", description)
    return scores


def as_frame(scores: pd.Series | pd.DataFrame) -> pd.DataFrame:
    """Convert a Series of scores to a frame with the column `score`; return a frame unchanged."""
    return scores.to_frame(SCORE) if isinstance(scores, pd.Series) else scores


def raw_label(dataset: Any, segment: str | slice = TEST) -> pd.DataFrame:
    """Return the label of a segment, or of a slice of dates, as loaded, before any processor.

    Raises RecordError if the handler has dropped its raw data.
    """
    handler, segments = (getattr(dataset, n, None) for n in ("handler", "segments"))
    try:
        if handler is not None and segments is not None:
            # Not `prepare`: a dataset of windows would return windows.
            span = segment if isinstance(segment, slice) else slice(*segments[segment])
            label = handler.fetch(span, col_set="label", data_key="raw")
        else:
            label = dataset.prepare(segment, col_set="label", data_key="raw")
    except AttributeError as error:  # handlers of Qlib itself with drop_raw=True
        raise RecordError(
            f"the raw label of segment {segment!r} is missing: the handler was created with "
            "drop_raw=True. Records need it; remove drop_raw."
        ) from error
    if isinstance(label.columns, pd.MultiIndex):
        label = label.droplevel(0, axis=1)
    return as_frame(label)


def select_label(label: pd.DataFrame, position: int) -> pd.Series:
    """Return one of several label columns; RecordError if there is no such column."""
    if not -label.shape[1] <= position < label.shape[1]:
        raise RecordError(
            f"label_col={position}, but the label has {label.shape[1]} columns: "
            f"{list(map(str, label.columns))}."
        )
    column: pd.Series = label.iloc[:, position]
    return column


def _explain_missing_ic(score: pd.Series) -> str:
    """Return why no day has an IC, as a sentence that says what to do."""
    scores_by_day = score.groupby(level="datetime")
    if scores_by_day.count().max() > 1 and scores_by_day.nunique().max() == 1:
        return (
            "the model gives all instruments of a day the same score. It has found nothing in the "
            "data: try other features, a smaller learning rate or more training."
        )
    return (
        "no day has two instruments with different scores and labels. Use a universe of several "
        "instruments."
    )


class SigAnaRecord(Record):
    """Evaluates `pred.pkl` against `label.pkl`; writes to `sig_analysis/` and logs metrics.

    Writes `ic.pkl`, `ric.pkl` (Series by day) and the chart `ic.png`; with `ana_long_short` also
    `long_short_r.pkl` and `long_avg_r.pkl`. Logs IC, ICIR, Rank IC, Rank ICIR, and with
    `ana_long_short` the annual return (mean x `ann_scaler`) and Sharpe ratio of both series.
    `ann_scaler` is the number of bars per year, by default that of the scores' frequency in
    `region` (default: the session's): 252 for daily bars of the US.
    `label_col` selects one of several label columns; `skip_existing` skips the work if the
    artifacts exist. Corresponds to Qlib's SigAnaRecord; a missing dependency is an error here,
    and Qlib's `ann_scaler` is always 252.
    """

    artifact_path: ClassVar[str | None] = "sig_analysis"
    depend_cls: ClassVar[type[Record] | None] = SignalRecord
    input_artifacts: ClassVar[tuple[str, ...]] = ("pred.pkl", "label.pkl")
    needs_cross_section: ClassVar[bool] = True

    def __init__(
        self,
        recorder: Recorder | None = None,
        ana_long_short: bool = False,
        ann_scaler: float | None = None,
        label_col: int = 0,
        skip_existing: bool = False,
        *,
        region: str | None = None,
    ) -> None:
        super().__init__(recorder)
        self.ana_long_short = ana_long_short
        self.ann_scaler = ann_scaler
        self.region = region
        self.label_col = label_col
        self.skip_existing = skip_existing

    def check_settings(self) -> None:
        get_region(self.region)

    def generate(self) -> dict[str, pd.Series] | None:
        """Compute, store and log; return the series, or None if skipped."""
        if self.skip_existing and self._is_complete():
            return None
        self.check()
        score = self.load("pred.pkl").iloc[:, 0]
        label = select_label(self.load("label.pkl"), self.label_col)
        ic, rank_ic = calc_ic(score, label)
        if ic.isna().all():
            raise RecordError(
                f"the IC is undefined on all {len(ic)} days: {_explain_missing_ic(score)}"
            )
        metrics = ic_figures(ic, rank_ic)
        series = {"ic.pkl": ic, "ric.pkl": rank_ic}
        if self.ana_long_short:
            returns = calc_long_short_return(score, label)
            scaler = self._periods_per_year(returns[0])
            series |= dict(zip(("long_short_r.pkl", "long_avg_r.pkl"), returns, strict=True))
            for name, daily in zip(("Long-Short", "Long-Avg"), returns, strict=True):
                metrics[f"{name} Ann Return"] = annual_return(daily, scaler)
                metrics[f"{name} Ann Sharpe"] = annual_sharpe(daily, scaler)
        self.recorder.log_batch(finite_metrics(metrics), step=0)
        self.save(**series)
        self._save_chart(ic, rank_ic)
        return series

    def _periods_per_year(self, returns: pd.Series) -> float:
        scaler = self.ann_scaler
        if scaler is None:
            scaler = periods_per_year(region=self.region, dates=returns.index)
        log.info("long-short returns: a year has %g bars in the annual figures", scaler)
        return scaler

    def list(self) -> Names:
        long_short = ["long_short_r.pkl", "long_avg_r.pkl"] if self.ana_long_short else []
        return ["ic.pkl", "ric.pkl", *long_short]

    def _save_chart(self, ic: pd.Series, rank_ic: pd.Series) -> None:
        figure = ic_chart(ic, rank_ic)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, CHART)
            figure.savefig(path, dpi=130, pil_kwargs={"compress_level": 1})
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


def segments_by_name(segments: Segments) -> dict[str, str | slice]:
    """Return segments as a mapping; raises ConfigError for a single name."""
    if isinstance(segments, str):
        raise ConfigError(
            f"segments is {segments!r}; expected a list of names, or a mapping of names to "
            f"segments: [{segments}]."
        )
    return dict(segments) if isinstance(segments, Mapping) else {s: s for s in segments}


class SegmentICRecord(Record):
    """Logs `valid.IC`, `valid.Rank IC`, `test.ICIR`, ... against the raw label.

    `segments`: names of segments, of which those are predicted that the dataset has (others than
    train, valid and test must exist); or a mapping of names of your own to a segment's name or a
    slice of dates. `train` is not among the defaults
    because it is the largest. The scores of the test segment are read from `pred.pkl` if the run
    has it. Corresponds to Qlib's MultiSegRecord, which logs no metrics.
    """

    def __init__(
        self,
        model: Any = None,
        dataset: Any = None,
        recorder: Recorder | None = None,
        segments: Segments = ("valid", TEST),
        label_col: int = 0,
    ) -> None:
        super().__init__(recorder)
        self.model = model
        self.dataset = dataset
        self.segments = segments
        self.label_col = label_col

    def check_segment_names(self, names: Collection[str]) -> None:
        for segment in segments_by_name(self.segments).values():
            if isinstance(segment, str):
                check_name("segment of SegmentICRecord", segment, {*names, *USUAL_SEGMENTS})

    def generate(self, segments: Segments | None = None, save: bool = False) -> dict[str, float]:
        """Predict each segment; log and return the metrics.

        `segments` replaces those of the record. `save` stores `results-NAME.pkl` of each: a mapping
        of "all-IC" and "all-Rank-IC" to Series by day, "mean-IC" and "mean-Rank-IC" to their means.
        """
        metrics: dict[str, float] = {}
        for name, segment in self._select(self.segments if segments is None else segments).items():
            scores = self._scores(segment).iloc[:, 0]
            label = select_label(raw_label(self.dataset, segment), self.label_col)
            ic, rank_ic = calc_ic(scores, label)
            figures = ic_figures(ic, rank_ic)
            log.info("segment %s: %s", name, ", ".join(f"{k} {v:.4f}" for k, v in figures.items()))
            metrics |= {f"{name}.{k}": v for k, v in figures.items()}
            if save:
                results = {"all-IC": ic, "mean-IC": figures["IC"]}
                results |= {"all-Rank-IC": rank_ic, "mean-Rank-IC": figures["Rank IC"]}
                self.save(**{f"results-{name}.pkl": results})
        metrics = finite_metrics(metrics)
        self.recorder.log_batch(metrics, step=0)
        return metrics

    def _select(self, segments: Segments) -> dict[str, str | slice]:
        """Return the segments by name; of names alone, those that the dataset has."""
        selected = segments_by_name(segments)
        if isinstance(segments, Mapping):
            return selected
        dataset_segments = getattr(self.dataset, "segments", {})
        return {name: segment for name, segment in selected.items() if name in dataset_segments}

    def _scores(self, segment: str | slice) -> Any:
        if segment == TEST:
            try:
                return self.recorder.load_object("pred.pkl")
            except LoadObjectError:
                return predict_frame(self.model, self.dataset)
        return predict_frame(self.model, self.dataset, segment)


class SignalMseRecord(Record):
    """Writes the mean squared error of the scores to `sig_analysis/`, and logs MSE and RMSE.

    `mse.pkl` and `rmse.pkl` are numbers: the mean over all samples of the test segment that have a
    score and a raw label, and its root. They tell something only of scores on the label's scale: a
    model whose labels are ranked or normalised by its handler has others. `label_col` selects one
    of several label columns. Corresponds to Qlib's SignalMseRecord, which fails if a label is
    missing.
    """

    artifact_path: ClassVar[str | None] = "sig_analysis"
    depend_cls: ClassVar[type[Record] | None] = SignalRecord
    input_artifacts: ClassVar[tuple[str, ...]] = ("pred.pkl", "label.pkl")

    def __init__(self, recorder: Recorder | None = None, label_col: int = 0) -> None:
        super().__init__(recorder)
        self.label_col = label_col

    def generate(self) -> dict[str, float]:
        """Compute, store and log; return the metrics."""
        self.check()
        score = self.load("pred.pkl").iloc[:, 0].astype(float)
        label = select_label(self.load("label.pkl"), self.label_col).astype(float)
        error = (score - label).dropna()
        if error.empty:
            raise RecordError(
                f"none of the {len(score)} samples has both a score and a label: the mean squared "
                "error is undefined."
            )
        mse = float((error**2).mean())
        metrics = {"MSE": mse, "RMSE": mse**0.5}
        self.recorder.log_batch(finite_metrics(metrics), step=0)
        self.save(**{"mse.pkl": mse, "rmse.pkl": mse**0.5})
        return metrics

    def list(self) -> Names:
        return ["mse.pkl", "rmse.pkl"]


class HFSignalRecord(Record):
    """Evaluates `pred.pkl` against `label.pkl` bar by bar; writes to `hg_sig_analysis/`.

    Writes `ic`, `ric`, `long_pre`, `short_pre` (the shares of the top fifth that rise and of the
    bottom fifth that fall relative to the bar's mean), `long_short_r` and `long_avg_r`. Logs their
    means, ICIR, Rank ICIR and mean / std of the long-short return, none annualised. Corresponds to
    Qlib's HFSignalRecord, including the spelling of the folder.
    """

    artifact_path: ClassVar[str | None] = "hg_sig_analysis"
    depend_cls: ClassVar[type[Record] | None] = SignalRecord
    input_artifacts: ClassVar[tuple[str, ...]] = ("pred.pkl", "label.pkl")

    def generate(self) -> dict[str, Any]:
        """Compute, store and log; return the series."""
        self.check()
        score, label = (self.load(name).iloc[:, 0] for name in self.input_artifacts)
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
        objects = {f"{n}.pkl": s for n, s in zip(_HF_SERIES, series, strict=True)}
        self.recorder.log_batch(finite_metrics(metrics), step=0)
        self.save(**objects)
        return objects

    def list(self) -> Names:
        return [f"{name}.pkl" for name in _HF_SERIES]
