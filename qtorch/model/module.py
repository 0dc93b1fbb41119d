"""The one training loop: network, loss, optimizer, scheduler."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, TypeVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.core.optimizer import LightningOptimizer
from pytorch_lightning.profilers import PassThroughProfiler
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from qtorch.core.errors import ConfigError, unknown_name
from qtorch.data.batches import Batch
from qtorch.data.sample_set import Samples
from qtorch.metrics.ic import ICMeter
from qtorch.metrics.loss import Loss, mean_of
from qtorch.model.day_label import DayLabel
from qtorch.model.factories import OptimizerFactory, SchedulerPlan
from qtorch.model.feeding import Feeder, readout_of
from qtorch.model.rank_group import RankGroup
from qtorch.model.sharding import shard
from qtorch.model.step_loader import Steps
from qtorch.model.tally import Tally, weighted_mean
from qtorch.nn.lora import LoRA, acting

TRAIN_LOSS, VALID_LOSS, VALID_IC, VALID_RANK_IC, RATE = (
    "train/loss",
    "valid/loss",
    "valid/ic",
    "valid/rank_ic",
    "lr",
)
PRETRAIN_LOSS, PRETRAIN_VALID = "train/pretrain_loss", "valid/pretrain_loss"
METRICS = (
    TRAIN_LOSS,
    VALID_LOSS,
    VALID_IC,
    VALID_RANK_IC,
    PRETRAIN_LOSS,
    PRETRAIN_VALID,
    RATE,
)
# Short names of what an early stop or a scheduler may watch, and whether less is better.
MONITORS = {"loss": VALID_LOSS, "ic": VALID_IC, "rank_ic": VALID_RANK_IC, "train_loss": TRAIN_LOSS}
STATE = "qtorch_module"
Kind = TypeVar("Kind", bound=nn.Module)
# Hooks of callbacks that lie between a batch's backward and its optimizer step.
STEP_HOOKS = (
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
)


def no_interruption() -> bool:
    """Stands where nobody asks to stop."""
    return False


class ScoreModule(pl.LightningModule):
    """Trains a network to score samples; Lightning runs it, over `Steps` of batches.

    One `training_step` takes all batches of a `Steps`, with an optimizer step each (or one for
    each `accumulate` batches and the epoch's tail), so that Lightning's own cost is paid once;
    the numbers are the same bit for bit, however many there are. Hence optimization is "manual"
    in Lightning's words, and the module does what the trainer's arguments of the same names say:
    `accumulate_grad_batches`, `gradient_clip_val`, `gradient_clip_algorithm`.

    Loss sums and scores stay on the device and are read once an epoch: `train/loss`,
    `valid/loss` (weighted means over samples), `valid/ic`, `valid/rank_ic` (means over days;
    against `batch.extra["raw_label"]` where it is, else `y`; the first label column), `lr`.

    `loss` is a `Loss`, or any callable (score, target) -> mean, which is then weighted by the
    number of samples of a batch and takes neither weights nor masks. `complete` vouches that no
    label of the training samples is missing. `day_label` treats the labels of training batches.
    Where no callback looks between backward and step
    (and neither a GradScaler nor a strategy has work there), both are called without Lightning's
    hooks: the same numbers, faster.

    `ranks`: the processes that share each batch. The loss of each is its part of the whole
    batch's mean, so that the averaged gradients are that mean's; sums and days are added up over
    the ranks before they are told. That bears a step of which `training_sums` of the parts of a
    batch add up to those of the whole; `undivided` says why another one's do not (None: they do).
    A subclass with a step of its own says it itself, or a fit on several devices refuses it.
    """

    undivided: ClassVar[str | None] = None

    def __init__(
        self,
        network: nn.Module,
        loss: Callable[..., Any],
        optimizer: OptimizerFactory,
        scheduler: SchedulerPlan | None = None,
        *,
        num_days: int = 0,
        accumulate: int = 1,
        clip_value: float | None = None,
        clip_algorithm: str | None = None,
        complete: bool = False,
        day_label: DayLabel | None = None,
        interrupted: Callable[[], bool] = no_interruption,
        ranks: RankGroup | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.network = network
        self.feeder = Feeder(network)
        self.loss = loss
        self.optimizer_factory = optimizer
        self.plan = scheduler
        self.accumulate = accumulate
        self.clip_value, self.clip_algorithm = clip_value, clip_algorithm
        self.interrupted = interrupted
        self.ranks = RankGroup() if ranks is None else ranks
        self.meter = ICMeter(num_days)
        self.complete = complete
        self.day_label = day_label
        self.direct = False
        self.pretraining_epochs = 0
        self.tally, self.valid_tally = Tally(), Tally()

    # -- one batch -----------------------------------------------------------------------------

    def forward(self, batch: Batch) -> Tensor:
        """The scores of a batch, as the network gives them: `[B]` or `[B, Q]`, of a day batch
        `[G, N]` or `[G, N, Q]`."""
        return self.feeder(batch)

    def loss_sums(
        self, batch: Batch, state: Mapping[str, Tensor] | None = None, *, complete: bool = False
    ) -> tuple[Tensor, Tensor | int, Tensor]:
        """`(sum of weight x loss, sum of weight, scores)` of a batch.

        With `state` a pure function of (parameters and buffers, batch), so that members of one
        architecture can be stacked; without, of the network's own.
        """
        score = self.feeder(batch, state)
        return (*self.sums_of(score, batch, complete=complete), score)

    def sums_of(
        self, score: Tensor, batch: Batch, *, complete: bool = False
    ) -> tuple[Tensor, Tensor | int]:
        """`(sum of weight x loss, sum of weight)` of scores in the form of their batch."""
        target = batch.y
        if target is None:
            raise ConfigError("these batches have no label to learn from (`y` is None).")
        columns = score.dim() > batch.date.dim() and score.shape[-1] == 1
        if target.shape[-1] == 1 and not columns:
            target = target[..., 0]
        plain = batch.weight is None and batch.mask is None
        known = plain and (complete or not isinstance(self.loss, Loss))
        if batch.blank and known:
            return score.sum() * 0.0, 0
        if isinstance(self.loss, Loss):
            if known:
                return self.loss.complete_sum(score, target), target.numel()
            return self.loss.sums(score, target, batch.weight, batch.mask)
        if not plain:
            raise ConfigError(
                f"the loss {type(self.loss).__name__} takes neither sample weights nor masks; "
                "derive it from qtorch.metrics.loss.Loss."
            )
        if score.shape != target.shape:
            raise ValueError(f"score {list(score.shape)}, but target {list(target.shape)}.")
        return self.loss(score, target) * len(score), len(score)

    # -- training ------------------------------------------------------------------------------

    def bind(self, train: Samples, valid: Samples | None) -> None:
        """Hook: the samples, on the device, before the training begins; after it those of `train`
        have their raw labels no more."""

    @property
    def pretrains(self) -> bool:
        """Whether the running epoch is one of the first `pretraining_epochs`. They are added to
        the trainer's `max_epochs`, have losses of their own names, and neither the best weights
        nor an early stop nor the scheduler knows of them."""
        return self.current_epoch < self.pretraining_epochs

    def trains(self, kind: type[Kind]) -> Kind:
        """The network, for a step that only fits one kind; ConfigError where it is another. In a
        fine-tuning by LoRA it has its own weights, not those that it acts with: see `acting`."""
        network = self.network.network if isinstance(self.network, LoRA) else self.network
        if not isinstance(network, kind):
            raise ConfigError(
                f"{type(self).__name__} trains a {kind.__name__}; the network is a "
                f"{type(network).__name__}."
            )
        return network

    @contextmanager
    def acting(self, kind: type[Kind]) -> Iterator[Kind]:
        """The network of one kind for a step that calls more of it than `forward`: inside the
        block it has the weights that it acts with, those of LoRA too."""
        network = self.trains(kind)
        with acting(self.network):
            yield network

    def training_sums(self, batch: Batch) -> tuple[Tensor, Tensor | int]:
        """Hook: `(sum of weight x loss, sum of weight)` that a training batch is learnt by."""
        return self.loss_sums(self.to_learn(batch), complete=self.complete)[:2]

    def to_learn(self, batch: Batch) -> Batch:
        """A training batch with its labels treated by day, where that is asked for."""
        if self.day_label is None or batch.y is None:
            return batch
        if not batch.is_day:
            raise ConfigError("day_label treats the labels of a day together: batch.order=day.")
        return replace(batch, y=self.day_label(batch.y, batch.mask))

    def on_train_start(self) -> None:
        self.direct = _nothing_between(self.trainer)

    def on_train_epoch_start(self) -> None:
        self.tally.reset(self.device)
        self.tally.told = {}

    def training_step(self, steps: Steps) -> None:
        tally, accumulate = self.tally, self.accumulate
        found = self.optimizers()
        optimizer = found[0] if isinstance(found, list) else found
        assert isinstance(optimizer, LightningOptimizer)
        mixed = torch.is_autocast_enabled(self.device.type)
        ends = self.plan is not None or self.trainer.max_steps != -1
        for batch in steps:
            total, share = self.training_sums(batch)
            loss = self._mean(total, share, batch)
            self._backward(loss if accumulate == 1 else loss / accumulate, mixed)
            tally.add(total.detach(), share)
            tally.pending += 1
            if tally.pending < accumulate and not steps.at_end:
                continue
            self._optimize(optimizer)
            tally.pending = 0
            if ends and self._ends_training():
                break
            if self.interrupted() and not steps.final:
                break

    def _mean(self, total: Tensor, share: Tensor | int, batch: Batch) -> Tensor:
        """The batch's loss; of a shared batch this rank's part, times the number of ranks by which
        gradients are divided."""
        size = self.ranks.size
        if size == 1:
            return total / share if isinstance(share, int) else mean_of(total, share)
        if isinstance(share, int):
            # Every rank counts alike, so that the whole is known without asking.
            return total * size / max(1, batch.num_whole * share // max(1, batch.num_samples))
        return mean_of(total * size, self.ranks.sum(share))

    def _backward(self, loss: Tensor, mixed: bool) -> None:
        call = loss.backward if self.direct else partial(self.manual_backward, loss)
        if not mixed:
            call()
            return
        # Lightning keeps the precision's context open around a whole training_step.
        with torch.autocast(self.device.type, enabled=False):
            call()

    def _optimize(self, optimizer: LightningOptimizer) -> None:
        if not self.direct:
            optimizer.step()
            optimizer.zero_grad()
            return
        bare = optimizer.optimizer
        self.on_before_optimizer_step(bare)
        bare.step()
        bare.zero_grad()
        # What LightningOptimizer.step counts: the trainer's global_step.
        done = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        done.increment_ready()
        done.increment_completed()

    def _ends_training(self) -> bool:
        """After an optimizer step: the scheduler's turn, and whether max_steps are done."""
        step, most = self.trainer.global_step, self.trainer.max_steps
        self._step_scheduler("step", step)
        return most != -1 and step >= most

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        # Behind the GradScaler's unscaling, whatever the precision.
        if self.clip_value is not None:
            self.clip_gradients(optimizer, self.clip_value, self.clip_algorithm)

    def on_train_epoch_end(self) -> None:
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        name = PRETRAIN_LOSS if self.pretrains else TRAIN_LOSS
        sums = self.ranks.sum(self.tally.sums()).tolist()
        self._tell({name: weighted_mean(*sums), RATE: float(rate)})
        self._step_scheduler("epoch", self.current_epoch + 1)

    # -- validation ----------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self.valid_tally.reset(self.device)
        self.meter.reset()

    def validation_step(self, steps: Steps) -> None:
        for batch in steps:
            total, share, score = self.loss_sums(batch)
            self.valid_tally.add(total, share)
            label = batch.extra.get("raw_label", batch.y)
            assert label is not None
            first = score if score.dim() == batch.date.dim() else readout_of(self.loss)(score)
            self.meter.update(first, label[..., 0], batch.date, batch.mask)

    def on_validation_epoch_end(self) -> None:
        daily, sums = self.meter.compute(), self.ranks.sum(self.valid_tally.sums())
        if self.ranks.size > 1:
            daily = daily.merged(self.ranks.sum)
        found = torch.stack((daily.mean_ic(), daily.mean_rank_ic())).to(self.device)
        total, weight, ic, rank_ic = torch.cat((sums, found)).tolist()
        self.meter.reset()
        loss = weighted_mean(total, weight)
        self._tell({VALID_LOSS: loss, VALID_IC: ic, VALID_RANK_IC: rank_ic})

    def _tell(self, values: dict[str, float]) -> None:
        """To the callbacks and the progress bar; the keeper sends them to the run."""
        self.tally.told.update(values)
        self.log_dict(values, logger=False, prog_bar=True, on_step=False, on_epoch=True)

    # -- optimizer and scheduler ---------------------------------------------------------------

    def learnt(self) -> list[nn.Parameter]:
        """Hook: the parameters that the optimizer moves."""
        return [p for p in self.parameters() if p.requires_grad]

    def further_optimizers(self) -> list[Optimizer]:
        """Hook: optimizers beside that one. They are in the checkpoints; the module's own step
        makes them step."""
        return []

    def configure_optimizers(self) -> Any:
        optimizers = [self.optimizer_factory(self.learnt()), *self.further_optimizers()]
        return optimizers, [] if self.plan is None else [self.plan.factory(optimizers[0])]

    def _step_scheduler(self, interval: str, count: int) -> None:
        plan = self.plan
        if plan is None or plan.interval != interval or count % plan.frequency or self.pretrains:
            return
        scheduler = self.lr_schedulers()
        if not isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step()  # type: ignore[union-attr]  # one plan: no list, never None
            return
        name = MONITORS.get(plan.monitor or "loss", plan.monitor or "loss")
        metrics = self.trainer.callback_metrics
        if name not in metrics:
            raise ConfigError(unknown_name("metric for the scheduler", name, metrics))
        scheduler.step(float(metrics[name]))

    # -- for Lightning -------------------------------------------------------------------------

    def configure_model(self) -> None:
        shard(self.network, self.trainer.strategy, self._device_mesh)

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        return batch  # the loader gathers on the device

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[STATE] = self.tally.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.tally.load(checkpoint[STATE], self.device)


def _nothing_between(trainer: Any) -> bool:
    """Whether backward and optimizer step may be called without Lightning's hooks around them."""
    bare = all(
        getattr(type(callback), hook) is getattr(pl.Callback, hook)
        for callback in trainer.callbacks
        for hook in STEP_HOOKS
    )
    return (
        bare
        and isinstance(trainer.strategy, SingleDeviceStrategy)
        and isinstance(trainer.profiler, PassThroughProfiler)
        and getattr(trainer.precision_plugin, "scaler", None) is None
    )
