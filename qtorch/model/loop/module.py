"""The LightningModule that trains every network: one training loop for all models."""

from __future__ import annotations

import math
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

from qtorch.core.errors import ConfigError, unknown_name_message
from qtorch.data.dataset.batch import Batch
from qtorch.data.dataset.samples import Samples
from qtorch.metrics.ic import ICMeter
from qtorch.metrics.loss import BaseLoss, mean_from_sums
from qtorch.model.loop.factories import OptimizerFactory, SchedulerPlan, build_factory
from qtorch.model.loop.lightning_internals import count_optimizer_step
from qtorch.model.loop.loader import StepBatches
from qtorch.model.loop.rank_group import RankGroup
from qtorch.model.loop.scoring import ForwardAdapter, get_readout
from qtorch.model.loop.sharding import shard
from qtorch.nn.lora import LoRA, use_effective_weights


class LossAccumulator:
    """Weighted loss sum of an epoch in float64, and the metrics of that epoch.

    These are not attributes of the LightningModule itself because `nn.Module.__setattr__` costs a
    noticeable part of a small network's step. `num_pending` counts the batches whose gradients have
    not been used by an optimizer step yet (gradient accumulation). `epoch_metrics` holds the
    metrics of the running epoch.
    """

    def __init__(self) -> None:
        self.epoch_metrics: dict[str, float] = {}
        self.reset(torch.device("cpu"))

    def reset(self, device: torch.device) -> None:
        """Start a new epoch."""
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.weight = torch.zeros((), dtype=torch.float64, device=device)
        self.count = 0  # the part of the weight that is known on the host
        self.num_pending = 0

    def add(self, total: Tensor, weight: Tensor | int) -> None:
        """Add a batch: its sum of weight x loss, and its sum of weights."""
        self.loss += total
        if isinstance(weight, int):
            self.count += weight
        else:
            self.weight += weight

    def sums(self) -> Tensor:
        """Return the loss sum and the weight sum, `[2]` float64 on the device."""
        return torch.stack((self.loss, self.weight + self.count))

    def state(self) -> dict[str, Any]:
        """Return the state that a checkpoint in the middle of an epoch holds."""
        return {"sums": self.sums().cpu(), "told": dict(self.epoch_metrics)}

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore the state of a checkpoint."""
        self.reset(device)
        self.loss, self.weight = (part.to(device) for part in state["sums"].unbind())
        self.epoch_metrics = dict(state["told"])


def mean_or_nan(total: float, weight: float) -> float:
    """Return total / weight, or NaN if the weight is zero."""
    return total / weight if weight else math.nan


OPTIONS = ("drop_extreme", "zscore")


class DayLabel:
    """Drop the extreme labels of each day, then standardize the others.

    `drop_extreme`: the fraction of a day's labels, half at each end, that become NaN (0.05: the
    2.5% highest and lowest). `zscore`: rescale the others to mean 0 and standard deviation 1.
    MASTER (Li et al., AAAI 2024) is trained this way. Validation and prediction see every label
    unchanged.
    """

    def __init__(self, drop_extreme: float = 0.0, zscore: bool = False) -> None:
        if not 0 <= drop_extreme < 1:
            raise ConfigError(
                f"drop_extreme is {drop_extreme}; expected a fraction of at least 0 and below 1."
            )
        self.drop_extreme, self.zscore = float(drop_extreme), zscore

    def __call__(self, label: Tensor, mask: Tensor | None) -> Tensor:
        """Transform `label [G, N, Q]` with `mask [G, N]`; missing or dropped labels are NaN."""
        if mask is not None:
            label = label.masked_fill(~mask[..., None], torch.nan)
        if self.drop_extreme:
            # Ranks instead of quantiles: they drop an exact number, even with ties. NaN sorts last.
            rank = label.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
            count = (~label.isnan()).sum(1, keepdim=True)
            cut = (count * (self.drop_extreme / 2)).floor()
            label = label.masked_fill((rank < cut) | (rank >= count - cut), torch.nan)
        if self.zscore:
            has_label = ~label.isnan()
            count = has_label.sum(1, keepdim=True).clamp_min(1)
            mean = label.nansum(1, keepdim=True) / count
            deviation = label - mean
            spread = (deviation.square().nansum(1, keepdim=True) / count).sqrt()
            label = deviation / torch.where(spread > 0, spread, 1.0)
        return label


def day_label(spec: Any) -> DayLabel | None:
    """Build a DayLabel from None, a mapping of its arguments, or a DayLabel."""
    if spec is None or isinstance(spec, DayLabel):
        return spec
    if not isinstance(spec, Mapping):
        raise ConfigError(f"day_label is {spec!r:.80}; expected a mapping of {', '.join(OPTIONS)}.")
    for name in spec:
        if name not in OPTIONS:
            raise ConfigError(unknown_name_message("option of day_label", str(name), OPTIONS))
    return DayLabel(**spec)


TRAIN_LOSS, VALID_LOSS, VALID_IC, VALID_RANK_IC, LEARNING_RATE = (
    "train/loss",
    "valid/loss",
    "valid/ic",
    "valid/rank_ic",
    "lr",
)
PRETRAIN_LOSS, PRETRAIN_VALID_LOSS = "train/pretrain_loss", "valid/pretrain_loss"
METRICS = (
    TRAIN_LOSS,
    VALID_LOSS,
    VALID_IC,
    VALID_RANK_IC,
    PRETRAIN_LOSS,
    PRETRAIN_VALID_LOSS,
    LEARNING_RATE,
)
# Short names of the metrics that early stopping and schedulers can monitor.
MONITOR_NAMES = {
    "loss": VALID_LOSS,
    "ic": VALID_IC,
    "rank_ic": VALID_RANK_IC,
    "train_loss": TRAIN_LOSS,
}
MODULE_STATE_KEY = "qtorch_module"
NetworkT = TypeVar("NetworkT", bound=nn.Module)
# Callback hooks that Lightning calls between a batch's backward pass and its optimizer step.
STEP_HOOKS = (
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
)


def never_stop() -> bool:
    """Report that nobody requested a stop: the default of `is_stop_requested`."""
    return False


class ScoreModule(pl.LightningModule):
    """Train a network to score samples; Lightning runs it over `StepBatches`.

    One `training_step` processes all batches of a `StepBatches`, with an optimizer step for each
    (or for every `accumulate` batches, and one for the rest at the end of the epoch). Lightning's
    overhead is then paid once for all of them, and the numbers are bit-identical for any number of
    batches per step. This needs Lightning's manual optimization, so the module itself implements
    the trainer arguments `accumulate_grad_batches`, `gradient_clip_val` and
    `gradient_clip_algorithm`.

    Loss sums and scores stay on the device and are read once an epoch. Metrics: `train/loss` and
    `valid/loss` (weighted means over samples), `valid/ic` and `valid/rank_ic` (means over days, of
    the first label column; computed against `batch.extra["raw_label"]` if it is present, else
    against `y`), and `lr`.

    `loss`: a `Loss`, or any callable (score, target) -> mean. Such a mean is weighted by the number
    of samples of its batch, and supports neither sample weights nor masks.
    `complete`: the caller guarantees that no training sample lacks a label.
    `day_label`: transforms the labels of training batches within each day.
    `is_stop_requested`: asked after each optimizer step whether to leave the training step early.
    `ranks`: the processes that share each batch. Each rank's loss is its part of the mean over the
    whole batch, so that the gradients averaged by DDP are those of that mean. Loss sums and daily
    ICs are summed over the ranks before they are logged.

    Multi-device training is only correct for a step whose `training_sums` over the parts of a batch
    add up to those of the whole batch. `single_device_reason` says why a step does not have this
    property; None declares that it has. A subclass with a training step of its own must set it,
    otherwise a fit on several devices raises ConfigError.

    If no callback hooks in between backward and optimizer step (and neither a GradScaler nor a
    multi-device strategy is involved), both are called directly, without Lightning's hooks: the
    numbers are the same and the step is faster.
    """

    single_device_reason: ClassVar[str | None] = None

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
        is_stop_requested: Callable[[], bool] = never_stop,
        ranks: RankGroup | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.network = network
        self.forward_adapter = ForwardAdapter(network)
        self.loss = loss
        self.optimizer_factory = optimizer
        self.plan = scheduler
        self.accumulate = accumulate
        self.clip_value, self.clip_algorithm = clip_value, clip_algorithm
        self.is_stop_requested = is_stop_requested
        self.ranks = RankGroup() if ranks is None else ranks
        self.meter = ICMeter(num_days)
        self.complete = complete
        self.day_label = day_label
        self.bypass_hooks = False
        self.pretraining_epochs = 0
        self.accumulator, self.valid_accumulator = LossAccumulator(), LossAccumulator()

    # -- one batch -----------------------------------------------------------------------------

    def forward(self, batch: Batch) -> Tensor:
        """Return the network's scores of a batch.

        Their shape is `[B]` or `[B, Q]`, for a day batch `[G, N]` or `[G, N, Q]`.
        """
        return self.forward_adapter(batch)

    def loss_sums(
        self, batch: Batch, state: Mapping[str, Tensor] | None = None, *, complete: bool = False
    ) -> tuple[Tensor, Tensor | int, Tensor]:
        """Return `(sum of weight x loss, sum of weight, scores)` of a batch.

        With `state` (parameters and buffers by name), this is a pure function of (state, batch), so
        that several members of one architecture can be stacked. Without it, the network's own state
        is used.
        """
        score = self.forward_adapter(batch, state)
        return (*self.loss_sums_from_scores(score, batch, complete=complete), score)

    def loss_sums_from_scores(
        self, score: Tensor, batch: Batch, *, complete: bool = False
    ) -> tuple[Tensor, Tensor | int]:
        """Return `(sum of weight x loss, sum of weight)` for scores in the shape of their batch."""
        target = batch.y
        if target is None:
            raise ConfigError("these batches have no label to learn from (`y` is None).")
        has_label_axis = score.dim() > batch.date.dim() and score.shape[-1] == 1
        if target.shape[-1] == 1 and not has_label_axis:
            target = target[..., 0]
        is_unweighted = batch.weight is None and batch.mask is None
        is_complete = is_unweighted and (complete or not isinstance(self.loss, BaseLoss))
        if batch.is_dummy and is_complete:
            # A dummy batch: no weight, but it keeps the graph so that every rank runs backward.
            return score.sum() * 0.0, 0
        if isinstance(self.loss, BaseLoss):
            return self.loss.sums(score, target, batch.weight, batch.mask, complete=is_complete)
        if not is_unweighted:
            raise ConfigError(
                f"the loss {type(self.loss).__name__} takes neither sample weights nor masks; "
                "derive it from qtorch.metrics.loss.Loss."
            )
        if score.shape != target.shape:
            raise ValueError(f"score {list(score.shape)}, but target {list(target.shape)}.")
        return self.loss(score, target) * len(score), len(score)

    @classmethod
    def prepare_prediction(
        cls, network: nn.Module, samples: Samples, load_labeled: Callable[[slice], Samples]
    ) -> Samples:
        """Hook: return the samples of a prediction with all inputs that the network needs.

        `network` is a fitted network that this class has trained; `samples` are on the device.
        `load_labeled` returns the samples of a slice of dates, with labels as in training.
        """
        return samples

    # -- training ------------------------------------------------------------------------------

    def bind(self, train: Samples, valid: Samples | None) -> None:
        """Hook: receive the samples, on the device, before training begins.

        After this hook the raw labels of `train` are dropped to free memory.
        """

    @property
    def is_pretraining(self) -> bool:
        """Whether the running epoch is one of the first `pretraining_epochs`.

        Pretraining epochs are added to the trainer's `max_epochs` and log losses under names of
        their own. Best weights, early stopping and scheduler ignore them.
        """
        return self.current_epoch < self.pretraining_epochs

    def require_network(self, kind: type[NetworkT]) -> NetworkT:
        """Return the network, or raise ConfigError if it is not of the kind that this step needs.

        In LoRA fine-tuning, the returned network has its original weights; see `effective_network`.
        """
        network = self.network.network if isinstance(self.network, LoRA) else self.network
        if not isinstance(network, kind):
            raise ConfigError(
                f"{type(self).__name__} trains a {kind.__name__}; the network is a "
                f"{type(network).__name__}."
            )
        return network

    @contextmanager
    def effective_network(self, kind: type[NetworkT]) -> Iterator[NetworkT]:
        """Context manager for steps that call more of the network than `forward`.

        Inside the block the network has its effective weights, LoRA's low-rank products included.
        """
        network = self.require_network(kind)
        with use_effective_weights(self.network):
            yield network

    def training_sums(self, batch: Batch) -> tuple[Tensor, Tensor | int]:
        """Hook: return `(sum of weight x loss, sum of weight)` of a training batch."""
        return self.loss_sums(self.apply_day_label(batch), complete=self.complete)[:2]

    def apply_day_label(self, batch: Batch) -> Batch:
        """Return the batch with its labels transformed within each day if `day_label` is set."""
        if self.day_label is None or batch.y is None:
            return batch
        if not batch.is_day:
            raise ConfigError("day_label needs batches of whole days: set batch.order=day.")
        return replace(batch, y=self.day_label(batch.y, batch.mask))

    def on_train_start(self) -> None:
        self.bypass_hooks = _can_bypass_hooks(self.trainer)

    def on_train_epoch_start(self) -> None:
        self.accumulator.reset(self.device)
        self.accumulator.epoch_metrics = {}

    def training_step(self, steps: StepBatches) -> None:
        accumulator, accumulate = self.accumulator, self.accumulate
        optimizers = self.optimizers()
        optimizer = optimizers[0] if isinstance(optimizers, list) else optimizers
        assert isinstance(optimizer, LightningOptimizer)
        is_autocast = torch.is_autocast_enabled(self.device.type)
        checks_each_step = self.plan is not None or self.trainer.max_steps != -1
        for batch in steps:
            total, weight = self.training_sums(batch)
            loss = self._rank_loss(total, weight, batch)
            self._backward(loss if accumulate == 1 else loss / accumulate, is_autocast)
            accumulator.add(total.detach(), weight)
            accumulator.num_pending += 1
            if accumulator.num_pending < accumulate and not steps.is_epoch_end:
                continue
            self._step_optimizer(optimizer)
            accumulator.num_pending = 0
            if checks_each_step and self._finish_optimizer_step():
                break
            if self.is_stop_requested() and not steps.is_last:
                break

    def _rank_loss(self, total: Tensor, weight: Tensor | int, batch: Batch) -> Tensor:
        """Return the batch's mean loss; on several ranks, this rank's part of it.

        The part is multiplied by the number of ranks because DDP divides the gradients by it.
        """
        size = self.ranks.size
        if size == 1:
            return total / weight if isinstance(weight, int) else mean_from_sums(total, weight)
        if isinstance(weight, int):
            # Every rank counts samples, so the whole batch's weight is known without an all-reduce.
            return total * size / max(1, batch.global_size * weight // max(1, batch.num_samples))
        return mean_from_sums(total * size, self.ranks.sum(weight))

    def _backward(self, loss: Tensor, is_autocast: bool) -> None:
        backward = loss.backward if self.bypass_hooks else partial(self.manual_backward, loss)
        if not is_autocast:
            backward()
            return
        # Lightning's autocast context spans the whole training_step, backward should not run in it.
        with torch.autocast(self.device.type, enabled=False):
            backward()

    def _step_optimizer(self, optimizer: LightningOptimizer) -> None:
        if not self.bypass_hooks:
            optimizer.step()
            optimizer.zero_grad()
            return
        torch_optimizer = optimizer.optimizer
        self.on_before_optimizer_step(torch_optimizer)
        torch_optimizer.step()
        torch_optimizer.zero_grad()
        count_optimizer_step(self.trainer)

    def _finish_optimizer_step(self) -> bool:
        """Step a per-step scheduler; return whether `max_steps` has been reached."""
        step, max_steps = self.trainer.global_step, self.trainer.max_steps
        self._step_scheduler("step", step)
        return max_steps != -1 and step >= max_steps

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        # Clip here because the GradScaler has unscaled the gradients by now, at any precision.
        if self.clip_value is not None:
            self.clip_gradients(optimizer, self.clip_value, self.clip_algorithm)

    def on_train_epoch_end(self) -> None:
        learning_rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        name = PRETRAIN_LOSS if self.is_pretraining else TRAIN_LOSS
        sums = self.ranks.sum(self.accumulator.sums()).tolist()
        self._log_metrics({name: mean_or_nan(*sums), LEARNING_RATE: float(learning_rate)})
        self._step_scheduler("epoch", self.current_epoch + 1)

    # -- validation ----------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self.valid_accumulator.reset(self.device)
        self.meter.reset()

    def validation_step(self, steps: StepBatches) -> None:
        for batch in steps:
            total, weight, score = self.loss_sums(batch)
            self.valid_accumulator.add(total, weight)
            label = batch.extra.get("raw_label", batch.y)
            assert label is not None
            main_score = score if score.dim() == batch.date.dim() else get_readout(self.loss)(score)
            self.meter.update(main_score, label[..., 0], batch.date, batch.mask)

    def on_validation_epoch_end(self) -> None:
        daily, sums = self.meter.compute(), self.ranks.sum(self.valid_accumulator.sums())
        if self.ranks.size > 1:
            daily = daily.merge(self.ranks.sum)
        correlations = torch.stack((daily.mean_ic(), daily.mean_rank_ic())).to(self.device)
        total, weight, ic, rank_ic = torch.cat((sums, correlations)).tolist()
        self.meter.reset()
        loss = mean_or_nan(total, weight)
        self._log_metrics({VALID_LOSS: loss, VALID_IC: ic, VALID_RANK_IC: rank_ic})

    def _log_metrics(self, values: dict[str, float]) -> None:
        """Log metrics for callbacks and progress bar; CheckpointCallback sends them to the run."""
        self.accumulator.epoch_metrics.update(values)
        self.log_dict(values, logger=False, prog_bar=True, on_step=False, on_epoch=True)

    # -- optimizer and scheduler ---------------------------------------------------------------

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Hook: return the parameters that the optimizer updates."""
        return [p for p in self.parameters() if p.requires_grad]

    def extra_optimizers(self) -> list[Optimizer]:
        """Hook: return further optimizers beside the main one.

        They are saved in checkpoints. The module's own training step has to call their `step`.
        """
        return []

    def configure_optimizers(self) -> Any:
        optimizers = [self.optimizer_factory(self.trainable_parameters()), *self.extra_optimizers()]
        return optimizers, [] if self.plan is None else [self.plan.factory(optimizers[0])]

    def _step_scheduler(self, interval: str, count: int) -> None:
        plan = self.plan
        if (
            plan is None
            or plan.interval != interval
            or count % plan.frequency
            or self.is_pretraining
        ):
            return
        scheduler = self.lr_schedulers()
        if not isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step()  # type: ignore[union-attr]  # one plan: no list, never None
            return
        name = MONITOR_NAMES.get(plan.monitor or "loss", plan.monitor or "loss")
        metrics = self.trainer.callback_metrics
        if name not in metrics:
            raise ConfigError(unknown_name_message("metric for the scheduler", name, metrics))
        scheduler.step(float(metrics[name]))

    # -- for Lightning -------------------------------------------------------------------------

    def configure_model(self) -> None:
        shard(self.network, self.trainer.strategy, self.device_mesh)

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        return batch  # the loader gathers on the device

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[MODULE_STATE_KEY] = self.accumulator.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.accumulator.load(checkpoint[MODULE_STATE_KEY], self.device)


def get_module_class(spec: Any) -> type[ScoreModule]:
    """Return the class that a model's `module` argument names; ScoreModule if it names none."""
    if spec is None:
        return ScoreModule
    factory = build_factory(spec, "module")
    module_class = getattr(factory, "func", factory)
    if isinstance(module_class, type) and issubclass(module_class, ScoreModule):
        return module_class
    return ScoreModule


def _can_bypass_hooks(trainer: Any) -> bool:
    """Whether backward and optimizer step can be called without Lightning's hooks around them."""
    has_no_step_hooks = all(
        getattr(type(callback), hook) is getattr(pl.Callback, hook)
        for callback in trainer.callbacks
        for hook in STEP_HOOKS
    )
    return (
        has_no_step_hooks
        and isinstance(trainer.strategy, SingleDeviceStrategy)
        and isinstance(trainer.profiler, PassThroughProfiler)
        and getattr(trainer.precision_plugin, "scaler", None) is None
    )
