"""Lightning's metrics in the recorder's own run."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pytorch_lightning.loggers import Logger, MLFlowLogger

from qtorch.core.instantiate import init_instance_by_config
from qtorch.tracking.locations import resolve_uri

if TYPE_CHECKING:
    from qtorch.tracking.recorder import Recorder

log = logging.getLogger(__name__)

UNTOLD = "file:./mlruns"  # where Lightning's MLFlowLogger writes when it is told nothing


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


def with_recorders(given: Sequence[Any], own: RecorderLogger | None) -> list[Logger]:
    """A user's loggers, live or by configuration, and the recorder's own.

    Of Lightning's MLFlowLogger those are left out, and the log says so, that name neither a run of
    their own nor another tracking store: there one would open a second run, and in the recorder's
    run log each point twice and end it with the fit.
    """
    uri = None if own is None else getattr(own.recorder, "uri", None)
    place = {} if uri is None else {"tracking_uri": uri}
    loggers: list[Logger] = [
        init_instance_by_config(each, try_kwargs=place) if isinstance(each, Mapping) else each
        for each in given
    ]
    if own is None:
        return loggers
    kept = [each for each in loggers if not _doubles(each, own.version, uri)]
    if len(kept) < len(loggers):
        log.info("all metrics are in the run %s: its MLFlowLogger is left out.", own.version)
    return [*kept, own]


def _doubles(logger: Logger, run_id: str, uri: str | None) -> bool:
    """Whether a logger would write what the recorder writes, where it does."""
    if not isinstance(logger, MLFlowLogger) or logger._run_id not in (None, run_id):
        return False
    place = str(logger._tracking_uri)
    return place == UNTOLD or (uri is not None and resolve_uri(place) == resolve_uri(uri))
