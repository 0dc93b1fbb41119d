"""The signal of several windows, where records expect a model and a dataset."""

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
from qtorch.task.parts import dataset_of, segments_of, with_options
from qtorch.tracking.recorder import Recorder
from qtorch.trainer.run import make_records

log = logging.getLogger(__name__)

TEST = "test"
SIGNAL_RECORD = "SignalRecord"


class StitchedSignal(BaseModel):
    """Scores that are known already, as a model: records cannot tell the difference."""

    def __init__(self, scores: pd.DataFrame) -> None:
        self.scores = scores

    def predict(self, dataset: Any, segment: str | slice = TEST) -> pd.DataFrame:
        """The scores of a segment of the dataset, or of dates (inclusive)."""
        return _between(self.scores, dataset.segments, segment)


class StitchedDataset:
    """The windows' test segments as one, with the raw label that the windows stored.

    Its only segment is "test": what asks for another one finds none. The label costs nothing;
    for anything else the windows' real dataset is built, on the span of all of them.
    """

    def __init__(self, tasks: Sequence[Mapping[str, Any]], label: pd.DataFrame) -> None:
        first, last = segments_of(tasks[0])[TEST], segments_of(tasks[-1])[TEST]
        self.segments = {TEST: (first[0], last[1])}
        self._config = with_options(dataset_of(tasks[-1]), segments=self.segments)
        self._label = label

    @cached_property
    def whole(self) -> Any:
        """The real dataset; nothing of it is fitted."""
        return init_instance_by_config(self._config)

    def prepare(
        self, segments: Any, col_set: Any = "__all", data_key: str = "infer", **options: Any
    ) -> Any:
        """As the real dataset's; the raw label is at hand."""
        if (col_set, data_key) == ("label", "raw") and not options:
            return _between(self._label, self.segments, segments)
        return self.whole.prepare(segments, col_set, data_key, **options)


def window_records(more: Sequence[Any] = ()) -> list[Any]:
    """What each window records: its scores, and what else is wanted."""
    listed = [more] if isinstance(more, Mapping | str) else list(more)
    return listed if _has_signal(listed) else [SIGNAL_RECORD, *listed]


def make_stitched_records(
    base: Mapping[str, Any],
    tasks: Sequence[Mapping[str, Any]],
    prediction: pd.DataFrame,
    label: pd.DataFrame,
    recorder: Recorder,
) -> None:
    """The task's records on the stitched signal: `pred.pkl`, `label.pkl`, and what follows.

    They are given the signal as their model, and a StitchedDataset.
    """
    _warn_of_holes(prediction, label)
    given = base.get("record")
    listed = [given] if isinstance(given, Mapping | str) else list(given or [])
    records = listed if _has_signal(listed) else [SIGNAL_RECORD, *listed]
    make_records(recorder, records, StitchedSignal(prediction), StitchedDataset(tasks, label))


def _between(frame: pd.DataFrame, segments: Mapping[str, Any], segment: Any) -> pd.DataFrame:
    """The rows of a segment, or of a slice of dates."""
    if isinstance(segment, str) and segment not in segments:
        raise ConfigError(unknown_name("segment of the stitched signal", segment, segments))
    span = slice(*segments[segment]) if isinstance(segment, str) else segment
    days = frame.index.get_level_values("datetime")
    inside = np.ones(len(frame), dtype=bool)
    if span.start is not None:
        inside &= days >= pd.Timestamp(span.start)
    if span.stop is not None:
        inside &= days < pd.Timestamp(span.stop).normalize() + pd.Timedelta(days=1)
    return frame[inside]


def _has_signal(records: Sequence[Any]) -> bool:
    names = (r if isinstance(r, str) else r.get("_target_") or r.get("class") for r in records)
    return any(str(name).rpartition(".")[2] == SIGNAL_RECORD for name in names)


def _warn_of_holes(prediction: pd.DataFrame, label: pd.DataFrame) -> None:
    """Say which days of the test span have rows but no score."""
    days, scored = (f.index.get_level_values("datetime").unique() for f in (label, prediction))
    missing = days.difference(scored)
    if len(missing):
        log.warning(
            "%d of %d trading days have no score, the first %s: none of their rows is a sample",
            len(missing),
            len(days),
            f"{missing[0]:%Y-%m-%d}",
        )
