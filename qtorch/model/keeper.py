"""The checkpoint callback: metric history, best weights, and checkpoints for an exact resume."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from torch import Tensor

from qtorch.core.errors import ConfigError, DataError
from qtorch.core.heartbeat import beat, has_listeners
from qtorch.model.checkpoint import (
    CALLBACK_STATE_KEY,
    FORMAT_VERSION,
    link_best_checkpoint,
    save_and_rotate,
)
from qtorch.model.interruption import StopRequest, StopTraining
from qtorch.model.module import METRICS, PRETRAIN_LOSS, TRAIN_LOSS, ScoreModule
from qtorch.model.own_metrics import unsent_metrics
from qtorch.model.rank_group import RankGroup
from qtorch.model.rank_states import RankStates
from qtorch.model.sharding import gather_optimizer_state, gather_weights
from qtorch.model.step_loader import StepLoader

log = logging.getLogger(__name__)


class CheckpointCallback(Checkpoint):
    """Record history and best weights, and write checkpoints that training resumes from exactly.

    To Lightning's checkpoint it adds what an exact resume needs: the states of the random
    generators (torch, CUDA, numpy, Python), the best weights with their metric value, and the
    metrics so far. It writes a checkpoint after each epoch and within an epoch at each multiple of
    `every_n_steps` batches (one batch later if a validation comes in between). A requested stop is
    answered at the next such place: a checkpoint, then StopTraining. With several ranks, the first
    rank writes the checkpoint, which holds the state of every rank, and all ranks stop after the
    same step.

    `monitor` is the metric that decides the best epoch, `mode` is "min" or "max". This callback
    must be the last one to see the end of an epoch.
    """

    def __init__(
        self,
        loader: StepLoader,
        *,
        folder: Path | None,
        identity: str,
        monitor: str,
        mode: str,
        interruption: StopRequest,
        ranks: RankGroup,
        every_n_steps: int | None = None,
        log_epochs: bool = True,
    ) -> None:
        self.loader, self.folder, self.identity = loader, folder, identity
        self.ranks = ranks
        self.monitor, self.mode = monitor, mode
        self.every_n_steps, self.interruption, self.log_epochs = (
            every_n_steps,
            interruption,
            log_epochs,
        )
        self.history: list[dict[str, float]] = []
        self.best_epoch: int | None = None
        self.best_value = math.nan
        self.best_weights: dict[str, Tensor] | None = None
        self.best_optimizer: dict[str, Any] | None = None
        self.seconds = self.train_seconds = 0.0
        self.num_train_samples = 0  # samples that were trained on in train_seconds
        self.stop_position: tuple[int, int] | None = None
        self._resume_states: RankStates | None = None
        self._start_time = self._epoch_start_time = time.perf_counter()
        self._valid_seconds = 0.0
        self._has_validated = False
        self._is_checkpoint_due = False  # within the epoch, not yet written
        self._unsent_metrics: list[tuple[dict[str, float], int]] = []

    # -- hooks ---------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.ranks.connect()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start_time = self._epoch_start_time = time.perf_counter()
        self._valid_seconds = 0.0
        self.resend_metrics(trainer)
        if self._resume_states is not None:
            self._resume_states.restore(self.ranks, pl_module)
            self._resume_states = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._epoch_start_time = time.perf_counter()
        self._valid_seconds = 0.0
        self._has_validated = False

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._valid_start_time = time.perf_counter()
        # Each rank has batch norm statistics of its own. Validate what is saved: the first rank's.
        self.ranks.broadcast(pl_module.buffers())

    def on_validation_batch_end(self, *_: Any) -> None:
        beat("validation")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._has_validated = True
        self._valid_seconds += time.perf_counter() - self._valid_start_time

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        position = self.loader.position
        if has_listeners():
            self._send_heartbeat(trainer, position)
        if isinstance(pl_module, ScoreModule):
            num_pending = pl_module.accumulator.num_pending
        else:
            num_pending = position % trainer.accumulate_grad_batches
        if position >= self.loader.num_batches or num_pending:
            return  # a checkpoint cannot hold accumulated gradients
        if self.every_n_steps is not None and position % self.every_n_steps == 0:
            self._is_checkpoint_due = True
        if _validates_next(trainer):
            return  # a training resumed from here would skip this validation
        stop = self.ranks.any_rank(self.interruption.stop_requested)
        if stop or self._is_checkpoint_due:
            self._save_checkpoint(trainer)
        if stop:
            self._stop(trainer.current_epoch, position)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(pl_module, ScoreModule):
            metrics = pl_module.accumulator.epoch_metrics
            values = {k: metrics[k] for k in METRICS if k in metrics}
        else:
            values = {k: float(v) for k, v in trainer.callback_metrics.items()}
            values = self.ranks.gather(values)[0]  # all ranks need the same history and best epoch
            self._require_monitor(values)
        self.history.append(values)
        end_time = time.perf_counter()
        self.train_seconds += end_time - self._epoch_start_time - self._valid_seconds
        source, num_batches = (
            self.loader.source,
            self.loader.num_batches - self.loader.start_position,
        )
        self.num_train_samples += round(len(source.samples) * num_batches / len(source))
        self._log_epoch(trainer, values, end_time - self._epoch_start_time)
        if has_listeners():
            self._send_heartbeat(trainer, self.loader.position, values)
        is_best = self._update_best(trainer, pl_module, values)
        if isinstance(pl_module, ScoreModule):
            # Send before the checkpoint: after a crash between the two, a resume sends them again.
            self._send_metrics(trainer, values, trainer.current_epoch)
            self._check_loss(trainer, values)
        if self.folder is not None:
            self._save_checkpoint(trainer)
            if is_best and self.ranks.is_first:
                link_best_checkpoint(self.folder)
        if self.ranks.any_rank(self.interruption.stop_requested):
            self._stop(trainer.current_epoch + 1, 0)

    def resend_metrics(self, trainer: pl.Trainer) -> None:
        """Send once the metrics that a killed process may not have delivered.

        For a ScoreModule these are all metrics of the history. For a user's own module they are the
        ones that Lightning would have sent after the checkpoint.
        """
        unsent, self._unsent_metrics = self._unsent_metrics, []
        for values, step in unsent:
            self._send_metrics(trainer, values, step)

    # -- best weights, metrics, saving ---------------------------------------------------------

    def _update_best(
        self, trainer: pl.Trainer, module: pl.LightningModule, values: dict[str, float]
    ) -> bool:
        value = values.get(self.monitor, math.nan)
        is_better = value < self.best_value if self.mode == "min" else value > self.best_value
        if math.isnan(value) or not (is_better or math.isnan(self.best_value)):
            return False
        network = get_network(module)
        self.best_weights = gather_weights(network)
        self.best_optimizer = None
        if trainer.optimizers:
            state = gather_optimizer_state(trainer.strategy, trainer.optimizers[0], network)
            self.best_optimizer = _clone_tensors(state)
        self.best_epoch, self.best_value = trainer.current_epoch, value
        return True

    def _check_loss(self, trainer: pl.Trainer, values: dict[str, float]) -> None:
        loss = values.get(TRAIN_LOSS, values.get(PRETRAIN_LOSS, math.nan))
        if math.isfinite(loss):
            return
        problem = f"training loss of epoch {trainer.current_epoch} is {loss}"
        if self.best_weights is None:
            raise DataError(
                f"{problem}. Check for NaN features (add a Fillna processor) and for very large "
                "ones (normalize them), or lower the learning rate or set gradient_clip_val."
            )
        log.warning(
            "%s: stopping early; using the best weights, of epoch %d.", problem, self.best_epoch
        )
        trainer.should_stop = True

    def _require_monitor(self, values: dict[str, float]) -> None:
        """Raise ConfigError if a user's module has not logged the monitored metric.

        Such a module chooses its metric names itself, so this can only be checked after an epoch
        with its validation.
        """
        if self.monitor in values or not self._has_validated:
            return
        raise ConfigError(
            f"the LightningModule did not log the metric to monitor, {self.monitor!r}, in an "
            f"epoch; it logged {', '.join(sorted(values)) or 'nothing'}. "
            "Set monitor to one of its metrics, or log the monitored one with self.log."
        )

    def _send_metrics(self, trainer: pl.Trainer, values: dict[str, float], step: int) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)

    def _save_checkpoint(self, trainer: pl.Trainer) -> None:
        self._is_checkpoint_due = False
        if self.folder is not None:
            self.update_seconds()
            beat("checkpoint")
            # Every rank takes part in gathering the state; only the first one writes the file.
            save_and_rotate(trainer.save_checkpoint, self.folder, rotate=self.ranks.is_first)

    def _send_heartbeat(
        self, trainer: pl.Trainer, position: int, values: dict[str, float] | None = None
    ) -> None:
        num_batches = position - self.loader.start_position
        seconds = time.perf_counter() - self._epoch_start_time - self._valid_seconds
        batch_size = len(self.loader.source.samples) / max(len(self.loader.source), 1)
        details: dict[str, Any] = {"metrics": values} if values else {}
        beat(
            "training",
            epoch=trainer.current_epoch,
            epochs=trainer.max_epochs,
            batch=position,
            batches=self.loader.num_batches,
            samples_per_second=round(num_batches * batch_size / seconds) if seconds > 0 else None,
            **details,
        )

    def update_seconds(self) -> None:
        now = time.perf_counter()
        self.seconds += now - self._start_time
        self._start_time = now

    def _stop(self, epoch: int, position: int) -> None:
        self.stop_position = (epoch, position)
        raise StopTraining

    def _log_epoch(self, trainer: pl.Trainer, values: dict[str, float], seconds: float) -> None:
        metrics = "  ".join(f"{k} {v:.6g}" for k, v in values.items())
        level = logging.INFO if self.log_epochs else logging.DEBUG
        log.log(level, "epoch %d: %s  (%.2f s)", trainer.current_epoch, metrics, seconds)

    # -- state ---------------------------------------------------------------------------------

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[CALLBACK_STATE_KEY] = {
            "format": FORMAT_VERSION,
            "identity": self.identity,
            **RankStates.collect(self.ranks, pl_module).to_checkpoint(),
            "history": [dict(v) for v in self.history],
            "due": [] if isinstance(pl_module, ScoreModule) else unsent_metrics(trainer),
            "best_epoch": self.best_epoch,
            "best_value": self.best_value,
            "best_weights": self.best_weights,
            "best_optimizer": self.best_optimizer,
            "seconds": self.seconds,
            "train_seconds": self.train_seconds,
            "num_trained": self.num_train_samples,
            "inner_steps": self.loader.inner_steps,
            "cut_every": self.loader.cut_every,
            "position": self.loader.position,
        }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        state = checkpoint[CALLBACK_STATE_KEY]
        self._resume_states = RankStates.from_checkpoint(checkpoint, self.loader.source.seed)
        self.history = [dict(v) for v in state["history"]]
        is_score_module = isinstance(pl_module, ScoreModule)
        epoch_metrics = zip(self.history, range(len(self.history)), strict=True)
        self._unsent_metrics = list(epoch_metrics if is_score_module else state["due"])
        self.best_epoch, self.best_value = state["best_epoch"], state["best_value"]
        self.best_weights = state["best_weights"]
        self.best_optimizer = state["best_optimizer"]
        self.seconds, self.train_seconds = state["seconds"], state["train_seconds"]
        self.num_train_samples = state["num_trained"]


def get_network(module: pl.LightningModule) -> torch.nn.Module:
    """Return what holds the weights: a ScoreModule's network, or the user's module itself."""
    return module.network if isinstance(module, ScoreModule) else module


def _validates_next(trainer: pl.Trainer) -> bool:
    """Whether Lightning runs a validation between the finished batch and the next one."""
    loop: Any = trainer.fit_loop
    return bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))


def _clone_tensors(state: Any) -> Any:
    """Copy a nested state, with its tensors."""
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        return {k: _clone_tensors(v) for k, v in state.items()}
    return [_clone_tensors(v) for v in state] if isinstance(state, list) else state
