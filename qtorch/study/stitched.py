"""Present the stitched signal of several windows as a model and a dataset for records."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from qtorch.core.errors import ConfigError, unknown_name
from qtorch.core.instantiate import init_instance_by_config
from qtorch.model.base import BaseModel
from qtorch.task.parts import task_dataset, task_segments, with_arguments
from qtorch.tracking.recorder import Recorder
from qtorch.trainer.run import make_records

log = logging.getLogger(__name__)

TEST = "test"
SIGNAL_RECORD = "SignalRecord"


class StitchedSignal(BaseModel):
    """A model whose scores are already known, so that records can use it like any other."""

    def __init__(self, scores: pd.DataFrame) -> None:
        self.scores = scores

    def predict(self, dataset: Any, segment: str | slice = TEST) -> pd.DataFrame:
        """Return the scores of a segment of the dataset, or of a slice of dates (inclusive)."""
        return _select_dates(self.scores, dataset.segments, segment)


class StitchedDataset:
    """A dataset of the windows' test segments as one segment, with the windows' stored raw label.

    "test" is its only segment. The label is available at no cost; for anything else, the windows'
    real dataset is built over the span of all windows.
    """

    def __init__(self, tasks: Sequence[Mapping[str, Any]], label: pd.DataFrame) -> None:
        first, last = task_segments(tasks[0])[TEST], task_segments(tasks[-1])[TEST]
        self.segments = {TEST: (first[0], last[1])}
        self._config = with_arguments(task_dataset(tasks[-1]), segments=self.segments)
        self._label = label

    @cached_property
    def full_dataset(self) -> Any:
        """The real dataset, built on first use; its processors are not fitted."""
        return init_instance_by_config(self._config)

    def prepare(
        self, segments: Any, col_set: Any = "__all", data_key: str = "infer", **options: Any
    ) -> Any:
        """Prepare data as the real dataset does; the raw label needs no dataset."""
        if (col_set, data_key) == ("label", "raw") and not options:
            return _select_dates(self._label, self.segments, segments)
        return self.full_dataset.prepare(segments, col_set, data_key, **options)


def window_records(extra_records: Sequence[Any] = ()) -> list[Any]:
    """The records of each window: its scores (SignalRecord) and the given extra records."""
    records = [extra_records] if isinstance(extra_records, Mapping | str) else list(extra_records)
    return records if _has_signal_record(records) else [SIGNAL_RECORD, *records]


def make_stitched_records(
    base: Mapping[str, Any],
    tasks: Sequence[Mapping[str, Any]],
    prediction: pd.DataFrame,
    label: pd.DataFrame,
    recorder: Recorder,
) -> None:
    """Run the task's records on the stitched signal: `pred.pkl`, `label.pkl`, and the others.

    Their model is a StitchedSignal and their dataset a StitchedDataset.
    """
    _warn_about_missing_days(prediction, label)
    config = base.get("record")
    task_records = [config] if isinstance(config, Mapping | str) else list(config or [])
    records = task_records if _has_signal_record(task_records) else [SIGNAL_RECORD, *task_records]
    make_records(recorder, records, StitchedSignal(prediction), StitchedDataset(tasks, label))


def _select_dates(frame: pd.DataFrame, segments: Mapping[str, Any], segment: Any) -> pd.DataFrame:
    """The rows of a segment, or of a slice of dates (inclusive)."""
    if isinstance(segment, str) and segment not in segments:
        raise ConfigError(unknown_name("segment of the stitched signal", segment, segments))
    span = slice(*segments[segment]) if isinstance(segment, str) else segment
    days = frame.index.get_level_values("datetime")
    mask = np.ones(len(frame), dtype=bool)
    if span.start is not None:
        mask &= days >= pd.Timestamp(span.start)
    if span.stop is not None:
        mask &= days < pd.Timestamp(span.stop).normalize() + pd.Timedelta(days=1)
    return frame[mask]


def _has_signal_record(records: Sequence[Any]) -> bool:
    names = (r if isinstance(r, str) else r.get("_target_") or r.get("class") for r in records)
    return any(str(name).rpartition(".")[2] == SIGNAL_RECORD for name in names)


def _warn_about_missing_days(prediction: pd.DataFrame, label: pd.DataFrame) -> None:
    """Warn about days of the test span that have rows but no score."""
    days, scored_days = (f.index.get_level_values("datetime").unique() for f in (label, prediction))
    missing = days.difference(scored_days)
    if len(missing):
        log.warning(
            "%d of %d trading days have no score (the first is %s): none of their rows is a sample",
            len(missing),
            len(days),
            f"{missing[0]:%Y-%m-%d}",
        )
