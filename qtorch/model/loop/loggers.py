"""Lightning loggers of a fit: the recorder's, and those that the user configures."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from pytorch_lightning.loggers import Logger, MLFlowLogger

from qtorch.core.instantiate import init_instance_by_config
from qtorch.model.loop.lightning_internals import mlflow_target
from qtorch.tracking.locations import resolve_uri
from qtorch.tracking.recorder import MetricRecorder

log = logging.getLogger(__name__)

DEFAULT_MLFLOW_URI = "file:./mlruns"  # the default of Lightning's MLFlowLogger


class RecorderLogger(Logger):
    """Send metrics to a recorder. The run is started and ended by the recorder's owner, not here.

    The metrics of a qtorch network are logged once an epoch, with the epoch's number (from 0) as
    step: `train/loss`, `valid/loss`, `valid/ic`, `valid/rank_ic`, `lr`. A user's LightningModule
    decides what and when it logs; its step is Lightning's count of optimizer steps.
    """

    def __init__(self, recorder: MetricRecorder) -> None:
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
        """Do nothing: whoever trains the task logs its parameters."""


def build_loggers(specs: Sequence[Any], recorder_logger: RecorderLogger | None) -> list[Logger]:
    """Return the user's loggers (live or configured) and the recorder's logger.

    An MLFlowLogger of Lightning is left out, with a log line, if it has neither a run ID nor
    another tracking store: it would open a second run, or log each point twice into the recorder's
    run and end it with the fit.
    """
    uri = None if recorder_logger is None else recorder_logger.recorder.uri
    tracking_arguments = {} if uri is None else {"tracking_uri": uri}
    loggers: list[Logger] = [
        init_instance_by_config(each, try_kwargs=tracking_arguments)
        if isinstance(each, Mapping)
        else each
        for each in specs
    ]
    if recorder_logger is None:
        return loggers
    run_id = recorder_logger.version
    other_loggers = [each for each in loggers if not _is_duplicate(each, run_id, uri)]
    if len(other_loggers) < len(loggers):
        log.info("ignoring MLFlowLogger: all metrics are already logged to run %s", run_id)
    return [*other_loggers, recorder_logger]


def _is_duplicate(logger: Logger, run_id: str, uri: str | None) -> bool:
    """Whether a logger would write the recorder's metrics to the same place."""
    if not isinstance(logger, MLFlowLogger):
        return False
    logger_run_id, logger_uri = mlflow_target(logger)
    if logger_run_id not in (None, run_id):
        return False
    return logger_uri == DEFAULT_MLFLOW_URI or (
        uri is not None and resolve_uri(logger_uri) == resolve_uri(uri)
    )
