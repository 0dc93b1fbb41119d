"""Report validation metrics to the trial of a hyperparameter search, which may prune the training.

The sweeper names the trial in an environment variable, which reaches the training process however a
launcher starts it. The trial is not part of the task: the same parameters are the same task.
"""

from __future__ import annotations

import json
import logging
import math
import os
from typing import Any

import pytorch_lightning as pl

from qtorch.core.errors import ConfigError, unknown_name
from qtorch.tracking.locations import default_uri
from qtorch.tracking.trials.place import PRUNED_TAG, TRIAL_VARIABLE, storage_url

log = logging.getLogger(__name__)


class PruningCallback(pl.Callback):
    """Stop a training that the search's pruner gives up.

    After each validation the metric `report` is sent to the trial. If the trial should stop, the
    epoch ends as usual, the best weights are used, records are made, and the run gets the tag
    `pruned`. A database that does not respond never stops a training.
    """

    def __init__(self, trial: Any, report: str, recorder: Any) -> None:
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
                    unknown_name("metric to report to the search", self.report, metrics)
                )
            return False  # a pretraining epoch has no score yet
        value = float(metrics[self.report])
        if math.isnan(value):
            return False
        try:
            stop: bool = self.trial.should_stop(epoch, value)
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


def pruning_callbacks(recorder: Any) -> list[pl.Callback]:
    """Return the callback for the trial named in the environment, or none if nothing is pruned."""
    trial_json = os.environ.get(TRIAL_VARIABLE)
    if not trial_json:
        return []
    trial = json.loads(trial_json)
    if trial["pruner"] is None:
        return []
    from qtorch.tracking.trials.running import RunningTrial

    url = storage_url(trial["storage"], getattr(recorder, "uri", None) or default_uri())
    return [
        PruningCallback(
            RunningTrial(trial["study"], trial["id"], url, trial["pruner"]),
            trial["report"],
            recorder,
        )
    ]
