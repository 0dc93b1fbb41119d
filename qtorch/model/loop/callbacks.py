"""Lightning's progress bar, counting batches even if a training step has several of them."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import signal
import threading
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import RichProgressBar
from pytorch_lightning.loggers import Logger, MLFlowLogger

from qtorch.core.errors import ConfigError, unknown_name_message
from qtorch.core.instantiate import init_instance_by_config
from qtorch.model.loop.lightning_internals import mlflow_target
from qtorch.model.loop.loader import StepLoader
from qtorch.process.stops import SCHEDULER_SIGNALS, STOP_SIGNALS, stop_state
from qtorch.tracking.locations import default_uri, resolve_uri
from qtorch.tracking.recorder import MetricRecorder
from qtorch.tracking.trials.trial import PRUNED_TAG, TRIAL_VARIABLE, storage_url

if TYPE_CHECKING:
    from qtorch.tracking.trials.study import RunningTrial


class BatchProgressBar(RichProgressBar):
    """A rich progress bar that counts the batches of the training loader."""

    def __init__(self, loader: StepLoader) -> None:
        super().__init__()
        self.loader = loader

    @property
    def total_train_batches(self) -> int:
        return self.loader.num_batches

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        batch_number = self.loader.position - 1
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_number)


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
    other_loggers = [
        each for each in loggers if not _is_duplicate(each, recorder_logger.version, uri)
    ]
    if len(other_loggers) < len(loggers):
        log.info(
            "ignoring MLFlowLogger: all metrics are already logged to run %s",
            recorder_logger.version,
        )
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


class PruningCallback(pl.Callback):
    """Stop a training that the search's pruner gives up.

    After each validation the metric `report` is sent to the trial. If the trial should stop, the
    epoch ends as usual, the best weights are used, records are made, and the run gets the tag
    `pruned`. A database that does not respond never stops a training.
    """

    def __init__(self, trial: RunningTrial, report: str, recorder: MetricRecorder | None) -> None:
        self.trial, self.report, self.recorder = trial, report, recorder

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        stop = trainer.is_global_zero and self._should_stop(trainer)
        if trainer.world_size > 1:
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        if stop:
            trainer.should_stop = True

    def _should_stop(self, trainer: pl.Trainer) -> bool:
        metrics, epoch = trainer.callback_metrics, trainer.current_epoch
        if self.report not in metrics:
            if "valid/loss" in metrics:
                raise ConfigError(
                    unknown_name_message("metric to report to the search", self.report, metrics)
                )
            return False  # a pretraining epoch has no score yet
        value = float(metrics[self.report])
        if math.isnan(value):
            return False
        try:
            stop = self.trial.should_stop(epoch, value)
        except Exception as error:
            log.warning("could not report to the trial: %s", error)
            return False
        if stop:
            log.info("epoch %d: training pruned by the search (%s)", epoch, self.trial.pruner)
            if self.recorder is not None:
                reason = (
                    f"after epoch {epoch} with {self.report} {value:.6g}, by {self.trial.pruner}"
                )
                self.recorder.set_tags(**{PRUNED_TAG: reason})
        return stop


def pruning_callbacks(recorder: MetricRecorder | None) -> list[pl.Callback]:
    """Return the callback for the trial named in the environment, or none if nothing is pruned."""
    trial_json = os.environ.get(TRIAL_VARIABLE)
    if not trial_json:
        return []
    trial = json.loads(trial_json)
    if trial["pruner"] is None:
        return []
    from qtorch.tracking.trials.study import RunningTrial

    run_uri = None if recorder is None else recorder.uri
    url = storage_url(trial["storage"], run_uri or default_uri())
    return [
        PruningCallback(
            RunningTrial(trial["study"], trial["id"], url, trial["pruner"]),
            trial["report"],
            recorder,
        )
    ]


class TrainingInterrupted(KeyboardInterrupt):
    """A training was interrupted; the message says at which step and how to resume.

    `checkpoint` is the path of the saved checkpoint, or None.
    """

    def __init__(self, message: str, checkpoint: str | None = None) -> None:
        super().__init__(message)
        self.checkpoint = checkpoint


class StopTraining(BaseException):
    """Raised between two steps to leave Lightning's loops.

    It is not a KeyboardInterrupt, because Lightning would convert that to SystemExit and ignore any
    further Ctrl-C.
    """


class StopRequest:
    """A flag that asks a training to stop."""

    def __init__(self) -> None:
        self.stop_requested = False

    def is_requested(self) -> bool:
        """Whether the training should stop."""
        return self.stop_requested


class Interruption(StopRequest):
    """Context manager that turns a stop signal into a request to stop after the current step.

    A second Ctrl-C raises StopTraining at once. Further signals of a scheduler do not, since
    schedulers may send them twice. Signals can only be handled in the main thread; in other threads
    this changes nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._previous_handlers = {
                number: signal.signal(number, self._handle_signal) for number in STOP_SIGNALS
            }
            if stop_state.interrupt_signal is not None:  # its exception was swallowed
                self._handle_signal(stop_state.interrupt_signal, None)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers = {}

    def _handle_signal(self, number: int, frame: FrameType | None) -> None:
        if self.stop_requested and number in SCHEDULER_SIGNALS:
            stop_state.later_signals.add(number)
            return
        if self.stop_requested:
            for stop_number in self._previous_handlers:
                signal.signal(stop_number, signal.SIG_DFL)  # a third Ctrl-C kills the process
            raise StopTraining
        self.stop_requested = True
        stop_state.training_signal = number
        name = signal.Signals(number).name
        log.warning(
            "received %s: stopping after this step; press Ctrl-C again to stop immediately", name
        )
