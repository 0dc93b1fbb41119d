"""The trial of a search that a training belongs to: reported to after each validation.

A search's sweeper names the trial in the environment, which reaches the process of the training
however a launcher starts it, and is no part of the task: the same parameters are the same task.
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


class Pruning(pl.Callback):
    """Stops, in order, a training that its search's pruner gives up.

    After each validation the metric `report` goes to the trial. Where that is to stop, the epoch
    ends as any other, the best weights are taken, records are made, and the run has the tag
    `pruned`. A database that does not answer stops nothing.
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
            return False  # of pretraining: there is no score yet
        value = float(metrics[self.report])
        if math.isnan(value):
            return False
        try:
            stop: bool = self.trial.should_stop(epoch, value)
        except Exception as error:
            log.warning("the trial could not be reported to: %s", error)
            return False
        if stop:
            log.info("epoch %d: the search stops this training (%s)", epoch, self.trial.pruner)
            if self.recorder is not None:
                told = f"after epoch {epoch} with {self.report} {value:.6g}, by {self.trial.pruner}"
                self.recorder.set_tags(**{PRUNED_TAG: told})
        return stop


def pruning_callbacks(recorder: Any) -> list[pl.Callback]:
    """The callback of the trial that the environment names; none outside of a search, or where
    nothing is pruned."""
    named = os.environ.get(TRIAL_VARIABLE)
    if not named:
        return []
    told = json.loads(named)
    if told["pruner"] is None:
        return []
    from qtorch.tracking.trials.running import RunningTrial

    url = storage_url(told["storage"], getattr(recorder, "uri", None) or default_uri())
    return [
        Pruning(
            RunningTrial(told["study"], told["id"], url, told["pruner"]), told["report"], recorder
        )
    ]
