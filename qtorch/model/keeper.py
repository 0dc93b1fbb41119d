"""What a fit keeps: history, best weights, and checkpoints from which it goes on exactly."""

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
from qtorch.core.heartbeat import beat, is_heard
from qtorch.model.checkpoint import FORMAT, KEEPER, keep_best, save_rotating
from qtorch.model.interruption import Stoppable, StopTraining
from qtorch.model.module import METRICS, PRETRAIN_LOSS, TRAIN_LOSS, ScoreModule
from qtorch.model.own_metrics import due
from qtorch.model.rank_group import RankGroup
from qtorch.model.rank_states import RankStates
from qtorch.model.sharding import whole_optimizer, whole_weights
from qtorch.model.step_loader import StepLoader

log = logging.getLogger(__name__)


class Keeper(Checkpoint):
    """Keeps history, best weights and checkpoints; the last callback to see an epoch's end.

    Lightning's checkpoint, completed by what an exact continuation needs: the generators of
    torch, CUDA, numpy and Python, the best weights and their value, and the metrics so far. A
    checkpoint is written after each epoch, and within it at each multiple of `every_n_steps`
    batches (one later, where a validation comes between). An interruption is answered at the next
    such place: a checkpoint, then StopTraining. Of several ranks the first one writes, with what
    every rank holds of its own, and all stop after the same step.

    `monitor` is the metric whose best epoch's weights are kept (`mode` min or max).
    """

    def __init__(
        self,
        loader: StepLoader,
        *,
        folder: Path | None,
        identity: str,
        monitor: str,
        mode: str,
        interruption: Stoppable,
        ranks: RankGroup,
        every_n_steps: int | None = None,
        show: bool = True,
    ) -> None:
        self.loader, self.folder, self.identity = loader, folder, identity
        self.ranks = ranks
        self.monitor, self.mode = monitor, mode
        self.every_n_steps, self.interruption, self.show = every_n_steps, interruption, show
        self.history: list[dict[str, float]] = []
        self.best_epoch: int | None = None
        self.best_value = math.nan
        self.best_weights: dict[str, Tensor] | None = None
        self.best_optimizer: dict[str, Any] | None = None
        self.seconds = self.train_seconds = 0.0
        self.num_trained = 0  # samples in those train_seconds
        self.stopped_at: tuple[int, int] | None = None
        self._resumed: RankStates | None = None
        self._begin = self._epoch_begin = time.perf_counter()
        self._valid_seconds = 0.0
        self._validated = False
        self._owed = False  # a checkpoint within the epoch
        self._undelivered: list[tuple[dict[str, float], int]] = []

    # -- hooks ---------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.ranks.connect()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin = self._epoch_begin = time.perf_counter()
        self._valid_seconds = 0.0
        self.deliver(trainer)
        if self._resumed is not None:
            self._resumed.take_up(self.ranks, pl_module)
            self._resumed = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._epoch_begin = time.perf_counter()
        self._valid_seconds = 0.0
        self._validated = False

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._valid_begin = time.perf_counter()
        # A batch norm's statistics are each rank's own; judged is what is kept, the first rank's.
        self.ranks.share(pl_module.buffers())

    def on_validation_batch_end(self, *_: Any) -> None:
        beat("validation")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validated = True
        self._valid_seconds += time.perf_counter() - self._valid_begin

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        position = self.loader.position
        if is_heard():
            self._beat(trainer, position)
        if isinstance(pl_module, ScoreModule):
            waiting = pl_module.tally.pending
        else:
            waiting = position % trainer.accumulate_grad_batches
        if position >= self.loader.num_batches or waiting:
            return  # gradients that wait for their step are in no checkpoint
        if self.every_n_steps is not None and position % self.every_n_steps == 0:
            self._owed = True
        if _validates_next(trainer):
            return  # a training that goes on from here would leave this validation out
        stop = self.ranks.agree(self.interruption.requested)
        if stop or self._owed:
            self._save(trainer)
        if stop:
            self._stop(trainer.current_epoch, position)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(pl_module, ScoreModule):
            told = pl_module.tally.told
            values = {k: told[k] for k in METRICS if k in told}
        else:
            values = {k: float(v) for k, v in trainer.callback_metrics.items()}
            values = self.ranks.gather(values)[0]  # one history, and one best epoch, for all
            self._check_logged(values)
        self.history.append(values)
        now = time.perf_counter()
        self.train_seconds += now - self._epoch_begin - self._valid_seconds
        source, done = self.loader.source, self.loader.num_batches - self.loader.begun
        self.num_trained += round(len(source.samples) * done / len(source))
        self._say(trainer, values, now - self._epoch_begin)
        if is_heard():
            self._beat(trainer, self.loader.position, values)
        improved = self._keep_if_best(trainer, pl_module, values)
        if isinstance(pl_module, ScoreModule):
            # Sent before the checkpoint: what is lost between the two is sent again, not never.
            self._send(trainer, values, trainer.current_epoch)
            self._check(trainer, values)
        if self.folder is not None:
            self._save(trainer)
            if improved and self.ranks.first:
                keep_best(self.folder)
        if self.ranks.agree(self.interruption.requested):
            self._stop(trainer.current_epoch + 1, 0)

    def deliver(self, trainer: pl.Trainer) -> None:
        """Send what a killed process may not have delivered, once: all that is known. Of a user's
        own module that is what Lightning would have sent after the checkpoint."""
        undelivered, self._undelivered = self._undelivered, []
        for values, step in undelivered:
            self._send(trainer, values, step)

    # -- what it does --------------------------------------------------------------------------

    def _keep_if_best(
        self, trainer: pl.Trainer, module: pl.LightningModule, values: dict[str, float]
    ) -> bool:
        value = values.get(self.monitor, math.nan)
        better = value < self.best_value if self.mode == "min" else value > self.best_value
        if math.isnan(value) or not (better or math.isnan(self.best_value)):
            return False
        network = weights_of(module)
        self.best_weights = whole_weights(network)
        self.best_optimizer = None
        if trainer.optimizers:
            state = whole_optimizer(trainer.strategy, trainer.optimizers[0], network)
            self.best_optimizer = _copied(state)
        self.best_epoch, self.best_value = trainer.current_epoch, value
        return True

    def _check(self, trainer: pl.Trainer, values: dict[str, float]) -> None:
        loss = values.get(TRAIN_LOSS, values.get(PRETRAIN_LOSS, math.nan))
        if math.isfinite(loss):
            return
        found = f"the training loss of epoch {trainer.current_epoch} is {loss}"
        if self.best_weights is None:
            raise DataError(
                f"{found}. Are there NaN features (put a Fillna processor) or huge ones (a "
                "normalising processor)? Else lower the learning rate or set gradient_clip_val."
            )
        log.warning("%s: stopping, the best weights are of epoch %d.", found, self.best_epoch)
        trainer.should_stop = True

    def _check_logged(self, values: dict[str, float]) -> None:
        """A module that trains itself names its metrics itself: ConfigError where, after an epoch
        with its validation, it has not logged the one by which its best weights are known."""
        if self.monitor in values or not self._validated:
            return
        raise ConfigError(
            f"the best weights are those of the best {self.monitor!r}, which this LightningModule "
            f"has not logged in an epoch; it has logged {', '.join(sorted(values)) or 'nothing'}. "
            "Set monitor to one of its metrics, or log that one with self.log."
        )

    def _send(self, trainer: pl.Trainer, values: dict[str, float], step: int) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)

    def _save(self, trainer: pl.Trainer) -> None:
        self._owed = False
        if self.folder is not None:
            self._elapse()
            beat("checkpoint")
            # All ranks take part, the first one writes.
            save_rotating(trainer.save_checkpoint, self.folder, rotate=self.ranks.first)

    def _beat(
        self, trainer: pl.Trainer, position: int, values: dict[str, float] | None = None
    ) -> None:
        done = position - self.loader.begun
        seconds = time.perf_counter() - self._epoch_begin - self._valid_seconds
        size = len(self.loader.source.samples) / max(len(self.loader.source), 1)
        details: dict[str, Any] = {"metrics": values} if values else {}
        beat(
            "training",
            epoch=trainer.current_epoch,
            epochs=trainer.max_epochs,
            batch=position,
            batches=self.loader.num_batches,
            samples_per_second=round(done * size / seconds) if seconds > 0 else None,
            **details,
        )

    def _elapse(self) -> None:
        now = time.perf_counter()
        self.seconds += now - self._begin
        self._begin = now

    def _stop(self, epoch: int, position: int) -> None:
        self.stopped_at = (epoch, position)
        raise StopTraining

    def _say(self, trainer: pl.Trainer, values: dict[str, float], seconds: float) -> None:
        told = "  ".join(f"{k} {v:.6g}" for k, v in values.items())
        level = logging.INFO if self.show else logging.DEBUG
        log.log(level, "epoch %d: %s  (%.2f s)", trainer.current_epoch, told, seconds)

    # -- state ---------------------------------------------------------------------------------

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[KEEPER] = {
            "format": FORMAT,
            "identity": self.identity,
            **RankStates.of(self.ranks, pl_module).content(),
            "history": [dict(v) for v in self.history],
            "due": [] if isinstance(pl_module, ScoreModule) else due(trainer),
            "best_epoch": self.best_epoch,
            "best_value": self.best_value,
            "best_weights": self.best_weights,
            "best_optimizer": self.best_optimizer,
            "seconds": self.seconds,
            "train_seconds": self.train_seconds,
            "num_trained": self.num_trained,
            "inner_steps": self.loader.inner_steps,
            "cut_every": self.loader.cut_every,
            "position": self.loader.position,
        }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        state = checkpoint[KEEPER]
        self._resumed = RankStates.read(checkpoint, self.loader.source.seed)
        self.history = [dict(v) for v in state["history"]]
        ours = isinstance(pl_module, ScoreModule)
        known = zip(self.history, range(len(self.history)), strict=True)
        self._undelivered = list(known if ours else state["due"])
        self.best_epoch, self.best_value = state["best_epoch"], state["best_value"]
        self.best_weights = state["best_weights"]
        self.best_optimizer = state["best_optimizer"]
        self.seconds, self.train_seconds = state["seconds"], state["train_seconds"]
        self.num_trained = state["num_trained"]


def weights_of(module: pl.LightningModule) -> torch.nn.Module:
    """What holds the weights that count: the network of ours, a user's module itself."""
    return module.network if isinstance(module, ScoreModule) else module


def _validates_next(trainer: pl.Trainer) -> bool:
    """Whether Lightning validates between the batch that has ended and the next one."""
    loop: Any = trainer.fit_loop
    return bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))


def _copied(state: Any) -> Any:
    """Nested state with its tensors copied."""
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        return {k: _copied(v) for k, v in state.items()}
    return [_copied(v) for v in state] if isinstance(state, list) else state
