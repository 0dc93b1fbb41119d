"""The LightningModule that trains every network: one training loop for all models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, ClassVar, Literal, TypeVar

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from qtorch.core.errors import ConfigError, refuse_old_names
from qtorch.data.dataset.batch import Batch
from qtorch.data.dataset.samples import Samples
from qtorch.metrics.ic import ICMeter
from qtorch.metrics.loss import (
    BaseLoss,
    LabeledScores,
    mean_from_sums,
    takes_labeled_scores,
)
from qtorch.model.devices.step_graph import GraphedStep
from qtorch.model.loop.day_label import DayLabel
from qtorch.model.loop.factories import OptimizerFactory, build_factory
from qtorch.model.loop.loader import SingleStep, StepBatches, StepLoader, unpack_batches
from qtorch.model.loop.progress import (
    LEARNING_RATE,
    PRETRAIN_LOSS,
    TRAIN_LOSS,
    VALID_IC,
    VALID_LOSS,
    VALID_RANK_IC,
    LossAccumulator,
    mean_losses,
    mean_or_nan,
)
from qtorch.model.loop.rank_group import RankGroup
from qtorch.model.loop.schedules import SchedulerPlan, check_scheduler
from qtorch.model.loop.scoring import ForwardAdapter, get_readout
from qtorch.model.loop.sharding import shard
from qtorch.model.loop.weight_update import WeightUpdate, check_optimizer
from qtorch.nn.lora import LoRA, use_effective_weights

MODULE_STATE_KEY = "qtorch_module"
MONITORED = "monitored_value"  # a key of its state
OLD_NAMES = {
    "undivided": "single_device_reason",
    "learnt": "trainable_parameters",
    "further_optimizers": "extra_optimizers",
}
NetworkT = TypeVar("NetworkT", bound=nn.Module)


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

    `loss`: a `BaseLoss`, or any callable (score, target) -> mean. Such a mean is weighted by the
    number of samples of its batch, and supports neither sample weights nor masks; one that takes
    them is a `FunctionLoss`.
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

    The sums of an epoch are kept in `accumulator`, the weights are updated by `weight_update`;
    both are objects of their own that a fit of several members can replace, and neither is a tensor
    attribute of the module (`nn.Module.__setattr__` costs a noticeable part of a small step).
    """

    single_device_reason: ClassVar[str | None] = None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        refuse_old_names(cls, OLD_NAMES)

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
        self.pretraining_epochs = 0
        self.accumulator, self.valid_accumulator = LossAccumulator(), LossAccumulator()
        self.graphed_step = GraphedStep(mode=False, obstacle=None)

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
            # A dummy batch: no weight, but it keeps the graph so that every rank runs backward. Its
            # weight is a number or a tensor like that of the other ranks, which sum a tensor.
            weight: Tensor | int = 0
            if isinstance(self.loss, BaseLoss):
                weight = self.loss.sums(score, torch.zeros_like(target), complete=True)[1] * 0
            return score.sum() * 0.0, weight
        if isinstance(self.loss, BaseLoss):
            if complete and batch.weight is None and batch.mask is not None:
                sums = self._sum_padded_losses(score, target, batch)
                if sums is not None:
                    return sums
            return self.loss.sums(score, target, batch.weight, batch.mask, complete=is_complete)
        if not is_unweighted:
            raise ConfigError(
                f"these batches have sample weights or padded days, but the loss "
                f"{type(self.loss).__name__} is only called with (score, target). Give it an "
                "argument `weight` or `mask`, or derive it from qtorch.metrics.Loss (single "
                "samples) or qtorch.metrics.DayLoss (whole days)."
            )
        if score.shape != target.shape:
            raise ValueError(f"score {list(score.shape)}, but target {list(target.shape)}.")
        return self.loss(score, target) * len(score), len(score)

    def _sum_padded_losses(
        self, score: Tensor, target: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor | int] | None:
        """Return the sums of a batch in which only padding lacks labels, or None.

        The host knows how many labels there are, so that nothing has to count them. On several
        ranks the weights must be tensors, because each counts its own days.
        """
        if self.ranks.size > 1 or not takes_labeled_scores(self.loss):
            return None
        num_labels = batch.num_samples * (target.numel() // batch.date.numel())
        labeled = LabeledScores(score, target, None, batch.mask, num_labels)
        return self.loss.compute_sums(labeled)

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
        return replace(batch, y=self.day_label(batch.y, None))  # padding is NaN

    @cached_property
    def weight_update(self) -> WeightUpdate:
        """The object that updates the weights from the losses of batches."""
        return WeightUpdate(self, self.plan, self.accumulate)

    def on_train_start(self) -> None:
        self._set_optimizer_mode("train")
        if self.graphed_step.is_on:
            self._record_step()

    def on_train_end(self) -> None:
        self._set_optimizer_mode("eval")
        self.graphed_step.release()  # before the weights that it uses are moved

    def _set_optimizer_mode(self, mode: Literal["train", "eval"]) -> None:
        """Switch the weights of schedule-free optimizers between training and evaluation."""
        for optimizer in self.trainer.optimizers:
            switch = getattr(optimizer, mode, None)
            if callable(switch):
                switch()

    def on_train_epoch_start(self) -> None:
        self.accumulator.reset(self.device)
        self.accumulator.clear_metrics()
        self.graphed_step.begin_epoch()

    def training_step(self, batches: StepBatches | Batch) -> Tensor | None:
        """Train on the batches; return the loss of a single one, for the hooks of callbacks."""
        if isinstance(batches, StepBatches):
            self._train_batches(batches)
            return None
        loader: Any = self.trainer.train_dataloader
        assert isinstance(loader, StepLoader)
        return self._train_batches(SingleStep(loader, batches))

    def _train_batches(self, steps: StepBatches | SingleStep) -> Tensor | None:
        """Train on the batches of a step; return the loss of the last one."""
        accumulator, weight_update, loss, divisor = self.accumulator, self.weight_update, None, 1
        weight_update.begin(is_pretraining=self.is_pretraining)
        for batch in steps:
            sums = self.graphed_step.run(batch)
            if sums is None:
                total, weight = self.training_sums(batch)
                loss, divisor = self._loss_and_divisor(total, weight, batch)
                is_updated = weight_update.add(
                    loss,
                    divisor=divisor,
                    is_epoch_end=steps.is_epoch_end,
                    compute_again=partial(self._batch_loss, batch),
                )
            else:
                total, weight = sums
                loss, divisor = self._loss_and_divisor(total, weight, batch)
                weight_update.count_update()
                is_updated = True
            accumulator.add(total.detach(), weight)
            if not is_updated:
                continue
            if weight_update.has_reached_max_steps():
                break
            if self.is_stop_requested() and not steps.is_last:
                break
        return None if loss is None else loss.detach() / divisor

    def _record_step(self) -> None:
        """Record the training step as a CUDA graph, if that is possible."""
        if not self.weight_update.bypass_hooks:
            self.graphed_step.refuse("hooks between backward and optimizer step")
            return
        self.weight_update.begin(is_pretraining=False)
        optimizer: Any = self.weight_update.optimizer.optimizer
        loader: Any = self.trainer.train_dataloader
        self.graphed_step.record(self._run_step_on_device, self, optimizer, loader.load_usual_batch)

    def _run_step_on_device(self, batch: Batch) -> tuple[Tensor, Tensor | int]:
        """Train on a batch; return its loss sum and weight sum, which nothing counts."""
        total, weight = self.training_sums(batch)
        self.weight_update.run_on_device(*self._loss_and_divisor(total, weight, batch))
        return total.detach(), weight

    def _batch_loss(self, batch: Batch) -> Tensor:
        return self._rank_loss(*self.training_sums(batch), batch)

    def _loss_and_divisor(
        self, total: Tensor, weight: Tensor | int, batch: Batch
    ) -> tuple[Tensor, int]:
        """Return a batch's loss, and a number by which it is still to be divided."""
        if self.ranks.size == 1 and isinstance(weight, int) and weight:
            return total, weight
        return self._rank_loss(total, weight, batch), 1

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

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if self.clip_value is None:
            return
        # Clip here because the GradScaler has unscaled the gradients by now, at any precision.
        if not getattr(optimizer, "_step_supports_amp_scaling", False):
            self.clip_gradients(optimizer, self.clip_value, self.clip_algorithm)
            return
        # Lightning leaves the gradients to a fused optimizer, which unscales them in its step, and
        # refuses to clip them in mixed precision.
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            scaler.unscale_(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if self.clip_algorithm == "value":
            nn.utils.clip_grad_value_(parameters, self.clip_value)
        else:
            nn.utils.clip_grad_norm_(parameters, self.clip_value)

    def on_train_epoch_end(self) -> None:
        name = PRETRAIN_LOSS if self.is_pretraining else TRAIN_LOSS
        losses = mean_losses(self.ranks.sum(self.accumulator.sums()))
        rates = self.weight_update.learning_rates()
        self._log_metrics([{name: a, LEARNING_RATE: b} for a, b in zip(losses, rates, strict=True)])
        if not self.is_pretraining:
            self.weight_update.step_scheduler("epoch", self.current_epoch + 1)

    # -- validation ----------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        self._set_optimizer_mode("eval")

    def on_validation_end(self) -> None:
        self._set_optimizer_mode("train")

    def on_validation_epoch_start(self) -> None:
        self.valid_accumulator.reset(self.device)
        self.meter.reset()

    def validation_step(self, batches: StepBatches | Batch) -> None:
        for batch in unpack_batches(batches):
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
        rows = torch.cat((sums, correlations)).reshape(4, -1).tolist()
        self.meter.reset()
        self._log_metrics(
            [
                {VALID_LOSS: mean_or_nan(total, weight), VALID_IC: ic, VALID_RANK_IC: rank_ic}
                for total, weight, ic, rank_ic in zip(*rows, strict=True)
            ]
        )

    def _log_metrics(self, member_metrics: list[dict[str, float]]) -> None:
        """Log metrics of each member; CheckpointCallback sends them to the run.

        Lightning's callbacks and its progress bar see those of the first member.
        """
        for metrics, values in zip(self.accumulator.epoch_metrics, member_metrics, strict=True):
            metrics.update(values)
        self.weight_update.read_metrics(member_metrics[0])
        # As tensors on the CPU: Lightning would copy numbers to the device and back again.
        tensors = {name: torch.tensor(value) for name, value in member_metrics[0].items()}
        if self.trainer.progress_bar_callback is None:
            # `log_dict` ends here as well, but takes as long as a small training step for each.
            self.trainer.callback_metrics.update(tensors)
            return
        self.log_dict(tensors, logger=False, prog_bar=True, on_step=False, on_epoch=True)

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
        check_optimizer(optimizers[0], self.ranks.size)
        if self.plan is None:
            return optimizers, []
        scheduler = self.plan.factory(optimizers[0])
        check_scheduler(scheduler, self.plan, has_validation=self.trainer.enable_validation)
        return optimizers, [scheduler]

    # -- for Lightning -------------------------------------------------------------------------

    def configure_model(self) -> None:
        shard(self.network, self.trainer.strategy, self.device_mesh)

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        return batch  # the loader gathers on the device

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        monitored_value = self.weight_update.monitored_value
        checkpoint[MODULE_STATE_KEY] = {**self.accumulator.state(), MONITORED: monitored_value}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint[MODULE_STATE_KEY]
        self.accumulator.load(state, self.device)
        self.weight_update.monitored_value = state.get(MONITORED)


def get_module_class(spec: Any) -> type[ScoreModule]:
    """Return the class that a model's `module` argument names; ScoreModule if it names none."""
    if spec is None:
        return ScoreModule
    factory = build_factory(spec, "module")
    module_class = getattr(factory, "func", factory)
    if isinstance(module_class, type) and issubclass(module_class, ScoreModule):
        return module_class
    return ScoreModule
