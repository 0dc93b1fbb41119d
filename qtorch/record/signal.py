"""The scores of a segment and the label they are judged by."""

from __future__ import annotations

import logging
from typing import Any

import pandas as pd

from qtorch.core.errors import RecordError
from qtorch.record.base import Names, Record
from qtorch.tracking.recorder import Recorder

log = logging.getLogger(__name__)

SCORE = "score"


class SignalRecord(Record):
    """Writes `pred.pkl` (column `score`) and `label.pkl` (raw label) of the test segment.

    Both are frames indexed by (datetime, instrument). Answers to Qlib's SignalRecord.
    """

    def __init__(
        self, model: Any = None, dataset: Any = None, recorder: Recorder | None = None
    ) -> None:
        super().__init__(recorder)
        self.model = model
        self.dataset = dataset

    def generate(self) -> pd.DataFrame:
        """Predict, store, and return the scores."""
        for name in ("model", "dataset"):
            if getattr(self, name) is None:
                raise RecordError(
                    f"SignalRecord needs a {name}; give '{name}: <{name.upper()}>' in the task's "
                    "record, or the object itself."
                )
        pred = as_frame(self.model.predict(self.dataset))
        label = raw_label(self.dataset)
        self.save(**{"pred.pkl": pred, "label.pkl": label})
        log.info("%d scores of the test segment are stored as pred.pkl", len(pred))
        return pred

    def list(self) -> Names:
        return ["pred.pkl", "label.pkl"]


def as_frame(scores: pd.Series | pd.DataFrame) -> pd.DataFrame:
    """Scores as a frame of one column `score`; a frame stays as it is."""
    return scores.to_frame(SCORE) if isinstance(scores, pd.Series) else scores


def raw_label(dataset: Any, segment: str = "test") -> pd.DataFrame:
    """The label of a segment as the loader gave it, before every processor.

    RecordError where the handler has thrown its raw data away.
    """
    handler, segments = (getattr(dataset, n, None) for n in ("handler", "segments"))
    try:
        if handler is not None and segments is not None:
            # Not prepare: that of a dataset of windows gives windows.
            span = slice(*segments[segment])
            label = handler.fetch(span, col_set="label", data_key="raw")
        else:
            label = dataset.prepare(segment, col_set="label", data_key="raw")
    except AttributeError as error:  # Qlib's own handlers with drop_raw=True
        raise RecordError(
            f"the raw label of segment {segment!r} is gone: the handler was made with "
            "drop_raw=True. Records need it; leave drop_raw out."
        ) from error
    if isinstance(label.columns, pd.MultiIndex):
        label = label.droplevel(0, axis=1)
    return as_frame(label)
