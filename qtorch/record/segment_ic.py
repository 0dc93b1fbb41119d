"""SegmentICRecord: the IC by segment, which distinguishes overfitting from a missing signal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from qtorch.core.errors import LoadObjectError
from qtorch.metrics.signal import calc_ic
from qtorch.record.base import Record
from qtorch.record.signal import as_frame, raw_label
from qtorch.record.signal_analysis import finite_metrics, ic_figures
from qtorch.tracking.recorder import Recorder


class SegmentICRecord(Record):
    """Logs `valid.IC`, `valid.Rank IC`, `test.ICIR`, ... against the raw label.

    Predicts those of `segments` that the dataset has. `train` is not among the defaults because it
    is the largest. The scores of the test segment are read from `pred.pkl` if the run has it.
    """

    artifact_path: ClassVar[str | None] = None

    def __init__(
        self,
        model: Any = None,
        dataset: Any = None,
        recorder: Recorder | None = None,
        segments: Sequence[str] = ("valid", "test"),
        label_col: int = 0,
    ) -> None:
        super().__init__(recorder)
        self.model = model
        self.dataset = dataset
        self.segments = segments
        self.label_col = label_col

    def generate(self) -> dict[str, float]:
        """Predict each segment; log and return the metrics."""
        dataset_segments = getattr(self.dataset, "segments", {})
        metrics: dict[str, float] = {}
        for segment in (s for s in self.segments if s in dataset_segments):
            label = raw_label(self.dataset, segment).iloc[:, self.label_col]
            ic, rank_ic = calc_ic(self._scores(segment).iloc[:, 0], label)
            metrics |= {f"{segment}.{k}": v for k, v in ic_figures(ic, rank_ic).items()}
        metrics = finite_metrics(metrics)
        self.recorder.log_batch(metrics, step=0)
        return metrics

    def _scores(self, segment: str) -> Any:
        if segment == "test":
            try:
                return self.recorder.load_object("pred.pkl")
            except LoadObjectError:
                return as_frame(self.model.predict(self.dataset))
        return as_frame(self.model.predict(self.dataset, segment))
