"""SignalRecord: the scores of the test segment and their raw label."""

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

    Both are frames indexed by (datetime, instrument). Corresponds to Qlib's SignalRecord.
    """

    def __init__(
        self, model: Any = None, dataset: Any = None, recorder: Recorder | None = None
    ) -> None:
        super().__init__(recorder)
        self.model = model
        self.dataset = dataset

    def generate(self) -> pd.DataFrame:
        """Predict the test segment; store and return the scores."""
        for name in ("model", "dataset"):
            if getattr(self, name) is None:
                raise RecordError(
                    f"SignalRecord needs a {name}; set '{name}: <{name.upper()}>' in the task's "
                    "record, or pass the object itself."
                )
        pred = as_frame(self.model.predict(self.dataset))
        label = raw_label(self.dataset)
        self.save(**{"pred.pkl": pred, "label.pkl": label})
        log.info("saved %d scores of the test segment to pred.pkl", len(pred))
        return pred

    def list(self) -> Names:
        return ["pred.pkl", "label.pkl"]


def as_frame(scores: pd.Series | pd.DataFrame) -> pd.DataFrame:
    """Convert a Series of scores to a frame with the column `score`; return a frame unchanged."""
    return scores.to_frame(SCORE) if isinstance(scores, pd.Series) else scores


def raw_label(dataset: Any, segment: str = "test") -> pd.DataFrame:
    """Return the label of a segment as loaded, before any processor.

    Raises RecordError if the handler has dropped its raw data.
    """
    handler, segments = (getattr(dataset, n, None) for n in ("handler", "segments"))
    try:
        if handler is not None and segments is not None:
            # Not `prepare`: a dataset of windows would return windows.
            span = slice(*segments[segment])
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
