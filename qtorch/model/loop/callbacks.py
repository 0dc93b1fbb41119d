"""Callbacks of a fit: the progress bar, and the early stop that a search's pruner decides."""

from __future__ import annotations

import html
import json
import logging
import math
import os
import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar, RichProgressBar, WeightAveraging

from qtorch.core.errors import ConfigError, unknown_name_message
from qtorch.core.instantiate import init_instance_by_config
from qtorch.model.loop.loader import StepLoader
from qtorch.tracking.pruning import PRUNED_TAG, TRIAL_VARIABLE, TrialJudge
from qtorch.tracking.recorder import MetricRecorder

log = logging.getLogger(__name__)

NOTEBOOK_SECONDS = 0.3  # between two updates of the progress bar


class BatchProgressBar(RichProgressBar):
    """A rich progress bar that counts the batches of the training loader.

    Lightning's own bar would count training steps, each of which may hold many batches.
    """

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
        batch_number = self.loader.position - 1  # of the step's last batch; Lightning adds one
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_number)


class NotebookProgressBar(ProgressBar):
    """A progress bar in the output of a notebook's cell, with the last validation's metrics."""

    def __init__(self, loader: StepLoader) -> None:
        super().__init__()
        self.loader = loader
        self._display: Any = None
        self._last_time = 0.0

    def disable(self) -> None:
        """Show nothing: this rank is not the first one."""
        self._display = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._display = ipython_display().display(self._page(trainer), display_id=True)

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        super().on_train_batch_end(*args, **kwargs)
        if time.monotonic() - self._last_time > NOTEBOOK_SECONDS:
            self._update(self.trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._update(trainer)

    def _update(self, trainer: pl.Trainer) -> None:
        self._last_time = time.monotonic()
        if self._display is not None:
            self._display.update(self._page(trainer))

    def _page(self, trainer: pl.Trainer) -> Any:
        position, num_batches = self.loader.position, self.loader.num_batches
        metrics = {
            name: f"{float(value):.6g}"
            for name, value in trainer.callback_metrics.items()
            if name.startswith("valid/")
        }
        last_epoch = "" if (trainer.max_epochs or -1) < 0 else f" of {trainer.max_epochs}"
        text = f"epoch {trainer.current_epoch + 1}{last_epoch}, batch {position} of {num_batches}"
        text += "".join(f", {name} {value}" for name, value in metrics.items())
        bar = f"<progress value='{position}' max='{num_batches}'></progress>"
        return ipython_display().HTML(f"{bar} {html.escape(text)}")


def ipython_display() -> Any:
    """Return IPython's module of displays, which has no types; a notebook has imported it."""
    import IPython.display

    return IPython.display


class EpochAveraging(WeightAveraging):
    """Average the weights at the ends of epochs, from epoch `start` on (stochastic averaging).

    Validations, the best epoch and the final weights are those of the average. After Izmailov et
    al., "Averaging Weights Leads to Wider Optima and Better Generalization", 2018.
    """

    def __init__(self, start: int = 0) -> None:
        super().__init__()
        self.start = start

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether the average takes up the weights after this step or epoch."""
        return epoch_idx is not None and epoch_idx >= self.start


class PruningCallback(pl.Callback):
    """Stop a training that the search's pruner gives up.

    After each validation the value of `metric` is reported to the trial. If the trial should stop,
    the epoch ends as usual, the best weights are used, records are generated, and the run gets the
    tag `pruned`. A database that does not respond never stops a training.
    """

    def __init__(self, trial: TrialJudge, metric: str, recorder: MetricRecorder | None) -> None:
        self.trial, self.metric, self.recorder = trial, metric, recorder

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        stop = trainer.is_global_zero and self._should_stop(trainer)
        if trainer.world_size > 1:  # rank 0 decides for all ranks
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        if stop:
            trainer.should_stop = True

    def _should_stop(self, trainer: pl.Trainer) -> bool:
        metrics, epoch = trainer.callback_metrics, trainer.current_epoch
        if self.metric not in metrics:
            if "valid/loss" in metrics:
                raise ConfigError(
                    unknown_name_message("metric to report to the search", self.metric, metrics)
                )
            return False  # a pretraining epoch has no score yet
        value = float(metrics[self.metric])
        if math.isnan(value):
            return False
        try:
            stop = self.trial.should_stop(epoch, value)
        except Exception as error:
            log.warning("could not report to the trial: %s", error)
            return False
        if stop:
            pruner = self.trial.pruner_name
            log.info("epoch %d: training pruned by the search (%s)", epoch, pruner)
            if self.recorder is not None:
                reason = f"after epoch {epoch} with {self.metric} {value:.6g}, by {pruner}"
                self.recorder.set_tags(**{PRUNED_TAG: reason})
        return stop


def pruning_callbacks(recorder: MetricRecorder | None) -> list[pl.Callback]:
    """Return the callback for the trial described in the environment; none outside of a search."""
    trial_json = os.environ.get(TRIAL_VARIABLE)
    if not trial_json:
        return []
    description = json.loads(trial_json)
    tracking_uri = None if recorder is None else recorder.uri
    trial = init_instance_by_config(description["judge"], tracking_uri=tracking_uri)
    return [PruningCallback(trial, description["report"], recorder)]
