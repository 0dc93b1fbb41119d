"""The results of a run that its report shows: scores, labels, daily IC, portfolio."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import pandas as pd

from qtorch.core.errors import LoadObjectError, RecordError
from qtorch.tracking.recorder import Recorder

Histories: TypeAlias = Mapping[str, Mapping[int, float]]
TRAINING_PREFIXES = ("train/", "valid/")  # prefixes of the metrics that the training logs by epoch

PORTFOLIO = "portfolio_analysis"
_REPORT = re.compile(rf"{PORTFOLIO}/report_normal_(.+)\.pkl")


@dataclass(frozen=True)
class RunResults:
    """The artifacts of one run; None for a missing one.

    `score` and `label` are Series by (datetime, instrument), `ic` and `rank_ic` Series by day;
    `report` and `positions` are the frames of PortAnaRecord with frequency `freq`.
    """

    recorder: Recorder
    score: pd.Series | None
    label: pd.Series | None
    ic: pd.Series | None
    rank_ic: pd.Series | None
    report: pd.DataFrame | None
    positions: pd.DataFrame | None
    freq: str

    @property
    def weight(self) -> pd.Series | None:
        """The weights of the positions, as fractions of the account."""
        return None if self.positions is None else self.positions["weight"]


def run_results(recorder: Recorder, label_col: int = 0) -> RunResults:
    """Load the results that exist; the daily backtest if there is one, else the first."""
    freq = _frequency(recorder)
    score, label = (_load_if_present(recorder, name) for name in ("pred.pkl", "label.pkl"))
    return RunResults(
        recorder=recorder,
        score=None if score is None else score.iloc[:, 0],
        label=None if label is None else _column(label, label_col),
        ic=_load_if_present(recorder, "sig_analysis/ic.pkl"),
        rank_ic=_load_if_present(recorder, "sig_analysis/ric.pkl"),
        report=_load_if_present(recorder, f"{PORTFOLIO}/report_normal_{freq}.pkl"),
        positions=_load_if_present(recorder, f"{PORTFOLIO}/positions_normal_{freq}.pkl"),
        freq=freq,
    )


def has_benchmark(report: pd.DataFrame) -> bool:
    """Whether the report has benchmark returns."""
    return "bench" in report and bool(report["bench"].notna().any())


def net_return(report: pd.DataFrame) -> pd.Series:
    """Return the daily returns after cost."""
    return report["return"] - report["cost"]


def net_excess_return(report: pd.DataFrame) -> pd.Series:
    """Return the daily returns after cost, less the benchmark's if there is one."""
    net = net_return(report)
    return net - report["bench"] if has_benchmark(report) else net


def training_histories(recorder: Recorder) -> Histories:
    """Return `{metric: {epoch: value}}` of the metrics that the training logged."""
    names = (n for n in recorder.list_metrics() if n.startswith(TRAINING_PREFIXES))
    return {name: recorder.metric_history(name) for name in names}


def run_description(recorder: Recorder) -> dict[str, str]:
    """Describe a run for its page: model, data, segments, seed, ID and start time."""
    params = recorder.list_params()
    description = {
        "Model": model_name(params),
        "Data": _data_description(params),
        "Trained on": _segment_dates(params, "train"),
        "Validated on": _segment_dates(params, "valid"),
        "Tested on": _segment_dates(params, "test"),
        "Seed": params.get("seed", ""),
        "Run": f"{recorder.name}, {recorder.id}",
        "Experiment": str(getattr(recorder, "experiment_name", "") or ""),
        "Started": recorder.start_time or "",
    }
    return {name: text for name, text in description.items() if text}


def model_name(params: Mapping[str, str]) -> str:
    """Return the class name of the network, else of the model."""
    return (
        _class_name(params, "model", "network") or _class_name(params, "model") or "unnamed model"
    )


def _class_name(params: Mapping[str, str], *path: str) -> str:
    """Return the class name in a part of the task, in Hydra's or Qlib's form."""
    for separator in (".", ".kwargs."):
        for key in ("_target_", "class"):
            name = params.get(separator.join((*path,)) + f".{key}")
            if name:
                return name.rpartition(".")[2]
    return ""


def _data_description(params: Mapping[str, str]) -> str:
    parts = [
        _class_name(params, "dataset", "handler"),
        _class_name(params, "dataset", "handler", "source"),
        _find_param(params, "provider_uri").rstrip("/").rpartition("/")[2],
        _find_param(params, "handler.instruments", "handler.kwargs.instruments"),
    ]
    return ", ".join(p for p in parts if p)


def _segment_dates(params: Mapping[str, str], name: str) -> str:
    text = _find_param(params, f"segments.{name}")
    dates = re.findall(r"\d{4}-\d\d-\d\d", text)
    return " to ".join(dates) if len(dates) == 2 else text


def _find_param(params: Mapping[str, str], *suffixes: str) -> str:
    return next(
        (v for k, v in params.items() if k.startswith("dataset") and k.endswith(suffixes)), ""
    )


def _frequency(recorder: Recorder) -> str:
    freqs = [m[1] for name in recorder.list_artifacts(PORTFOLIO) if (m := _REPORT.fullmatch(name))]
    return "1day" if "1day" in freqs or not freqs else freqs[0]


def _load_if_present(recorder: Recorder, name: str) -> Any:
    folder, _, _ = name.rpartition("/")
    if name not in recorder.list_artifacts(folder or None):
        return None
    try:
        return recorder.load_object(name)
    except LoadObjectError as error:
        raise RecordError(f"the report cannot read {name} of run {recorder.id}: {error}") from error


def _column(label: pd.DataFrame, position: int) -> pd.Series:
    if not -label.shape[1] <= position < label.shape[1]:
        raise RecordError(
            f"label_col={position}, but label.pkl has {label.shape[1]} columns: "
            f"{list(map(str, label.columns))}."
        )
    column: pd.Series = label.iloc[:, position]
    return column
