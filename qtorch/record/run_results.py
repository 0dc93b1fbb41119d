"""What a run holds for its report: scores, labels, daily IC, the portfolio's days."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import pandas as pd

from qtorch.core.errors import LoadObjectError, RecordError
from qtorch.tracking.recorder import Recorder

Histories: TypeAlias = Mapping[str, Mapping[int, float]]
PARTS = ("train/", "valid/")  # what the training logs by epoch

PORTFOLIO = "portfolio_analysis"
_REPORT = re.compile(rf"{PORTFOLIO}/report_normal_(.+)\.pkl")


@dataclass(frozen=True)
class RunResults:
    """The artifacts of one run; None for what it does not hold.

    `score` and `label` are Series by (datetime, instrument), `ic` and `rank_ic` by day, `report`
    and `positions` the frames of PortAnaRecord at frequency `freq`.
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
        """The positions as shares of the account."""
        return None if self.positions is None else self.positions["weight"]


def run_results(recorder: Recorder, label_col: int = 0) -> RunResults:
    """Read what there is; of several frequencies the days', else the first."""
    freq = _frequency(recorder)
    score, label = (_held(recorder, name) for name in ("pred.pkl", "label.pkl"))
    return RunResults(
        recorder=recorder,
        score=None if score is None else score.iloc[:, 0],
        label=None if label is None else _column(label, label_col),
        ic=_held(recorder, "sig_analysis/ic.pkl"),
        rank_ic=_held(recorder, "sig_analysis/ric.pkl"),
        report=_held(recorder, f"{PORTFOLIO}/report_normal_{freq}.pkl"),
        positions=_held(recorder, f"{PORTFOLIO}/positions_normal_{freq}.pkl"),
        freq=freq,
    )


def has_benchmark(report: pd.DataFrame) -> bool:
    """Whether there is a benchmark's return."""
    return "bench" in report and bool(report["bench"].notna().any())


def net_return(report: pd.DataFrame) -> pd.Series:
    """The return of each day after its cost."""
    return report["return"] - report["cost"]


def judged_return(report: pd.DataFrame) -> pd.Series:
    """The return that is judged: after cost, in excess of the benchmark where there is one."""
    net = net_return(report)
    return net - report["bench"] if has_benchmark(report) else net


def histories(recorder: Recorder) -> Histories:
    """`{metric: {epoch: value}}` of what the training logged."""
    names = (n for n in recorder.list_metrics() if n.startswith(PARTS))
    return {name: recorder.logged(name) for name in names}


def told_of_run(recorder: Recorder) -> dict[str, str]:
    """Model, data, segments, seed, id and times of a run, in words."""
    params = recorder.list_params()
    told = {
        "Model": model_name(params),
        "Data": _data(params),
        "Trained on": _segment(params, "train"),
        "Validated on": _segment(params, "valid"),
        "Tested on": _segment(params, "test"),
        "Seed": params.get("seed", ""),
        "Run": f"{recorder.name}, {recorder.id}",
        "Experiment": str(getattr(recorder, "experiment_name", "") or ""),
        "Started": recorder.start_time or "",
    }
    return {name: words for name, words in told.items() if words}


def model_name(params: Mapping[str, str]) -> str:
    """The network's class, else the model's."""
    return _class(params, "model", "network") or _class(params, "model") or "a model without a name"


def _class(params: Mapping[str, str], *path: str) -> str:
    """The class that a task's part names, in Hydra's form or in Qlib's."""
    for joint in (".", ".kwargs."):
        for key in ("_target_", "class"):
            found = params.get(joint.join((*path,)) + f".{key}")
            if found:
                return found.rpartition(".")[2]
    return ""


def _data(params: Mapping[str, str]) -> str:
    parts = [
        _class(params, "dataset", "handler"),
        _class(params, "dataset", "handler", "source"),
        _ending(params, "provider_uri").rstrip("/").rpartition("/")[2],
        _ending(params, "handler.instruments", "handler.kwargs.instruments"),
    ]
    return ", ".join(p for p in parts if p)


def _segment(params: Mapping[str, str], name: str) -> str:
    text = _ending(params, f"segments.{name}")
    dates = re.findall(r"\d{4}-\d\d-\d\d", text)
    return " to ".join(dates) if len(dates) == 2 else text


def _ending(params: Mapping[str, str], *ends: str) -> str:
    return next((v for k, v in params.items() if k.startswith("dataset") and k.endswith(ends)), "")


def _frequency(recorder: Recorder) -> str:
    found = [m[1] for name in recorder.list_artifacts(PORTFOLIO) if (m := _REPORT.fullmatch(name))]
    return "1day" if "1day" in found or not found else found[0]


def _held(recorder: Recorder, name: str) -> Any:
    folder, _, _ = name.rpartition("/")
    if name not in recorder.list_artifacts(folder or None):
        return None
    try:
        return recorder.load_object(name)
    except LoadObjectError as error:
        raise RecordError(f"the report cannot read {name} of run {recorder.id}: {error}") from error


def _column(label: pd.DataFrame, number: int) -> pd.Series:
    if not -label.shape[1] <= number < label.shape[1]:
        raise RecordError(
            f"label_col={number}, but label.pkl has {label.shape[1]} columns: "
            f"{list(map(str, label.columns))}."
        )
    column: pd.Series = label.iloc[:, number]
    return column
