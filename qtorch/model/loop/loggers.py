"""Lightning loggers of a fit: the recorder's, and those that the user configures."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger, MLFlowLogger
from pytorch_lightning.loggers.logger import (  # type: ignore[attr-defined]  # not in __all__
    DummyExperiment,
    DummyLogger,
)

from qtorch.core.errors import ConfigError
from qtorch.core.instantiate import flatten_dict, init_instance_by_config
from qtorch.model.loop.lightning_internals import mlflow_target
from qtorch.tracking.locations import resolve_uri
from qtorch.tracking.recorder import MetricRecorder

log = logging.getLogger(__name__)

DEFAULT_MLFLOW_URI = "file:./mlruns"  # the default of Lightning's MLFlowLogger


class RecorderLogger(Logger):
    """Send metrics to a recorder. The run is started and ended by the recorder's owner, not here.

    The metrics of a qtorch network are logged once an epoch, with the epoch's number (from 0) as
    step: `train/loss`, `valid/loss`, `valid/ic`, `valid/rank_ic`, `lr`. If there are validations
    within epochs, the step is the number of optimizer steps. A user's LightningModule decides what
    and when it logs; its step is Lightning's count of optimizer steps. It finds here what
    Lightning's MLFlowLogger has: `experiment` (the MlflowClient), `run_id`, and `save_dir`, the
    folder for the run's files.
    """

    def __init__(self, recorder: MetricRecorder, save_dir: Path | None = None) -> None:
        super().__init__()
        self.recorder = recorder
        self._save_dir = None if save_dir is None else str(save_dir)

    @property
    def name(self) -> str:
        return "recorder"

    @property
    def version(self) -> str:
        return str(self.recorder.id)

    @property
    def run_id(self) -> str:
        """The run ID."""
        return str(self.recorder.id)

    @property
    def experiment_id(self) -> str | None:
        """The ID of the run's experiment, if this process knows it."""
        return getattr(self.recorder, "experiment_id", None)

    @property
    def experiment(self) -> Any:
        """The MlflowClient of the run's store, or an object that ignores calls if it has none."""
        client = getattr(self.recorder, "client", None)
        if client is None and self.recorder.uri is not None:  # in a rank's process
            from qtorch.tracking.mlflow_store import open_store

            client = open_store(self.recorder.uri).client
        return DummyExperiment() if client is None else client

    @property
    def save_dir(self) -> str | None:
        """The folder for the run's files."""
        return self._save_dir

    @property
    def log_dir(self) -> str | None:
        """The folder for the run's files."""
        return self._save_dir

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        values = {k: float(v) for k, v in metrics.items() if k != "epoch"}
        if values:
            self.recorder.log_batch(values, step=0 if step is None else int(step))

    def log_hyperparams(
        self, params: dict[str, Any] | argparse.Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Log what a user's module keeps with `save_hyperparameters`, as the run's params."""
        values = params if isinstance(params, Mapping) else vars(params)
        if values:
            self.recorder.log_params(**flatten_dict(values))


def build_loggers(
    specs: Sequence[Any], recorder_logger: RecorderLogger | None, *, disabled: bool = False
) -> list[Logger]:
    """Return the user's loggers (live or configured) and the recorder's logger.

    An MLFlowLogger of Lightning is left out, with a log line, if it has neither a run ID nor
    another tracking store: it would open a second run, or log each point twice into the recorder's
    run and end it with the fit. Without any logger the result has one that ignores everything, so
    that callbacks and modules that log work as in a run; it is empty if `disabled`.
    """
    uri = None if recorder_logger is None else recorder_logger.recorder.uri
    loggers = [_build_logger(each, {} if uri is None else {"tracking_uri": uri}) for each in specs]
    if recorder_logger is None:
        return loggers or ([] if disabled else [DummyLogger()])
    run_id = recorder_logger.version
    other_loggers = [each for each in loggers if not _is_duplicate(each, run_id, uri)]
    if len(other_loggers) < len(loggers):
        log.info("ignoring MLFlowLogger: all metrics are already logged to run %s", run_id)
    # A user's module expects its own logger first.
    return [*other_loggers, recorder_logger]


def _build_logger(spec: Any, tracking_arguments: dict[str, Any]) -> Logger:
    try:
        logger = init_instance_by_config(spec, accept_types=Logger, try_kwargs=tracking_arguments)
    except ModuleNotFoundError as error:
        raise ConfigError(f"trainer.logger: {error}") from error
    if not isinstance(logger, Logger):
        raise ConfigError(
            f"trainer.logger is a {type(logger).__name__}; expected a Lightning logger."
        )
    return logger


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
