"""Lightning's metrics in the recorder's own run."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pytorch_lightning.loggers import Logger

if TYPE_CHECKING:
    from qtorch.tracking.recorder import Recorder


class RecorderLogger(Logger):
    """Sends metrics to a recorder. It starts and ends nothing: the recorder's owner does.

    The metrics of a network of qtorch are logged once an epoch, with the epoch's number (from 0)
    as their step: `train/loss`, `valid/loss`, `valid/ic`, `valid/rank_ic`, `lr`. A user's own
    LightningModule logs what and when it likes; its step is Lightning's count of optimizer steps.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    @property
    def name(self) -> str:
        return "recorder"

    @property
    def version(self) -> str:
        return str(self.recorder.id)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        values = {k: float(v) for k, v in metrics.items() if k != "epoch"}
        if values:
            self.recorder.log_batch(values, step=0 if step is None else int(step))

    def log_hyperparams(
        self, params: dict[str, Any] | argparse.Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing: the task's parameters are logged by who trains it."""
