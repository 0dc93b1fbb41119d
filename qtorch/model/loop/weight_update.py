"""From the loss of a batch to new weights: backward, clipping, optimizer, scheduler."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from inspect import signature
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.core.optimizer import LightningOptimizer
from pytorch_lightning.profilers import PassThroughProfiler
from pytorch_lightning.strategies import SingleDeviceStrategy
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from qtorch.core.errors import ConfigError
from qtorch.model.loop.lightning_internals import count_optimizer_step
from qtorch.model.loop.schedules import SchedulerPlan

log = logging.getLogger(__name__)

MAX_GRADIENTS = 64  # of losses, one for each batch size

# Callback hooks that Lightning calls between a batch's backward pass and its optimizer step.
STEP_HOOKS = (
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
)


class WeightUpdate:
    """Update the weights of a module from the losses of its batches.

    It is separate from ScoreModule so that a fit of several members can replace it, by one backward
    pass of all their losses and one update of their stacked parameters.

    `plan`: the learning rate scheduler. `accumulate`: batches per optimizer step. `num_pending`
    counts the batches whose gradients have not been used by an optimizer step yet.

    If no callback has a hook between backward and optimizer step (and neither a GradScaler nor a
    multi-device strategy is involved), both are called directly, without Lightning in between: the
    numbers are the same and the step is faster. The module's own hook, which clips the gradients,
    is called in either case.

    An optimizer that computes the loss several times in a step (LBFGS, SAM) gets a closure for it.
    Its first call returns the loss that is already known, unless the optimizer has changed weights
    or gradients before.
    """

    def __init__(self, module: pl.LightningModule, plan: SchedulerPlan | None, accumulate: int):
        self.module, self.plan, self.accumulate = module, plan, accumulate
        self.num_pending = 0
        self._closure_losses: list[Callable[[], Tensor]] = []  # of the pending batches
        self._loss_value = torch.zeros(())
        self._loss_gradients: dict[tuple[torch.dtype, int], Tensor] = {}  # by divisor
        self._has_warned = False
        # The scheduler's metric, until it has judged it.
        self.monitored_value: float | None = None
        self.bypass_hooks = _can_bypass_hooks(module.trainer)
        self.is_autocast = False

    def begin(self, *, is_pretraining: bool) -> None:
        """Prepare for the batches of one training step; called inside it.

        In pretraining the scheduler does not step.
        """
        module = self.module
        optimizers: Any = module.optimizers()
        self.optimizer: LightningOptimizer
        self.optimizer = optimizers[0] if isinstance(optimizers, list) else optimizers
        self.uses_closure = uses_closure(self.optimizer.optimizer, module.trainer.world_size)
        self.is_autocast = torch.is_autocast_enabled(module.device.type)
        self.is_pretraining = is_pretraining
        self.max_steps: int = module.trainer.max_steps

    def add(
        self,
        loss: Tensor,
        *,
        divisor: int,
        is_epoch_end: bool,
        compute_again: Callable[[], Tensor],
    ) -> bool:
        """Run backward on a batch's mean loss; return whether the weights were updated.

        The mean loss is `loss / divisor`; `compute_again` computes it with the current weights. An
        update, every `accumulate` batches, also steps a scheduler with the interval "step".
        """
        if self.accumulate > 1 or self.uses_closure or not self.bypass_hooks:
            loss, divisor = loss / divisor, 1
        self._backward(loss if self.accumulate == 1 else loss / self.accumulate, divisor)
        self.num_pending += 1
        if self.uses_closure:
            self._closure_losses.append(compute_again)
            if not is_epoch_end and self.num_pending >= self.accumulate:
                self._warn_about_batches()
            self._loss_value = self._loss_value.to(loss.device) + loss.detach() / self.accumulate
        if self.num_pending < self.accumulate and not is_epoch_end:
            return False
        self._update_weights()
        self.num_pending = 0
        self._closure_losses, self._loss_value = [], torch.zeros(())
        if self.plan is not None and not self.is_pretraining:
            self.step_scheduler("step", self.module.trainer.global_step)
        return True

    def _warn_about_batches(self) -> None:
        """Warn once that LBFGS compares the gradients of different samples."""
        if not self._has_warned and isinstance(self.optimizer.optimizer, torch.optim.LBFGS):
            log.warning(
                "LBFGS takes the difference between the gradients of two batches for curvature: "
                "set batch.size (or trainer.accumulate_grad_batches) to one step per epoch."
            )
        self._has_warned = True

    def has_reached_max_steps(self) -> bool:
        """Whether the fit has as many optimizer steps as `max_steps` allows (-1: any number)."""
        return self.max_steps != -1 and self.module.trainer.global_step >= self.max_steps

    def step_scheduler(self, interval: str, count: int) -> None:
        """Step the scheduler if the `count`-th interval ("step" or "epoch") is due."""
        plan = self.plan
        if plan is None or plan.interval != interval or count % plan.frequency:
            return
        scheduler = self.module.lr_schedulers()
        if not isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step()  # type: ignore[union-attr]  # one plan: no list, never None
        elif self.monitored_value is not None:
            # Without a validation since the last step there is nothing to judge.
            scheduler.step(self.monitored_value)
            self.monitored_value = None

    def read_metrics(self, metrics: Mapping[str, float]) -> None:
        """Remember the metric that the scheduler monitors, if it is among the metrics."""
        if self.plan is not None and self.plan.metric in metrics:
            self.monitored_value = metrics[self.plan.metric]

    def learning_rates(self) -> list[float]:
        """Return the learning rate of each member, of the first parameter group."""
        return [float(self.module.trainer.optimizers[0].param_groups[0]["lr"])]

    def _backward(self, loss: Tensor, divisor: int = 1) -> None:
        if self.bypass_hooks:
            backward = partial(loss.backward, self._loss_gradient(loss, divisor))
        else:
            backward = partial(self.module.manual_backward, loss)
        if not self.is_autocast:
            backward()
            return
        # Lightning's autocast context spans the whole training_step, backward should not run in it.
        with torch.autocast(self.module.device.type, enabled=False):
            backward()

    def _loss_gradient(self, loss: Tensor, divisor: int) -> Tensor:
        """Return the gradient of `loss / divisor` by the loss, which is the same in most steps.

        torch would compute it each time, and the division itself, which nobody reads.
        """
        key = loss.dtype, divisor
        if key not in self._loss_gradients:
            if len(self._loss_gradients) == MAX_GRADIENTS:
                self._loss_gradients.clear()
            self._loss_gradients[key] = torch.ones_like(loss) / divisor
        return self._loss_gradients[key]

    def _update_weights(self) -> None:
        optimizer = self.optimizer.optimizer
        if not self.bypass_hooks:
            if self.uses_closure:
                self.optimizer.step(closure=self._build_closure(optimizer))
            else:
                self.optimizer.step()
            self.optimizer.zero_grad()
            return
        if self.uses_closure:
            self.module.on_before_optimizer_step(optimizer)
            optimizer.step(self._build_closure(optimizer))  # type: ignore[arg-type]  # torch's annotation says float, its examples return tensors
            optimizer.zero_grad()
        else:
            self._step_directly(optimizer)
        count_optimizer_step(self.module.trainer)

    def _step_directly(self, optimizer: Optimizer) -> None:
        self.module.on_before_optimizer_step(optimizer)
        optimizer.step()
        optimizer.zero_grad()

    def run_on_device(self, loss: Tensor, divisor: int) -> None:
        """Run backward and update the weights as `add` does, without what the host counts.

        For a CUDA graph, which repeats nothing else: no closure, no accumulation, no hooks.
        """
        self._graph_gradient = self._loss_gradient(loss, divisor)  # its memory must stay
        self._backward(loss, divisor)
        self._step_directly(self.optimizer.optimizer)

    def count_update(self) -> None:
        """Count an update that a CUDA graph has made."""
        count_optimizer_step(self.module.trainer)

    def _build_closure(self, optimizer: Optimizer) -> Callable[[], Tensor]:
        """Return the function that computes loss and gradients of the pending batches."""
        versions = _tensor_versions(optimizer)

        def closure() -> Tensor:
            if _tensor_versions(optimizer) == versions:
                return self._loss_value
            optimizer.zero_grad()
            total = torch.zeros_like(self._loss_value)
            with torch.enable_grad():
                for compute_loss in self._closure_losses:
                    loss = compute_loss() / self.accumulate
                    self._backward(loss)
                    total += loss.detach()
            if self.bypass_hooks:  # otherwise Lightning calls the hook
                self.module.on_before_optimizer_step(optimizer)
            return total

        return closure


def uses_closure(optimizer: Optimizer, num_devices: int) -> bool:
    """Whether an optimizer may compute the loss several times in a step.

    Those of torch do not, except LBFGS. On several devices no optimizer gets a closure.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        return True
    is_of_torch = type(optimizer).__module__.startswith("torch.optim")
    return num_devices == 1 and not is_of_torch and bool(signature(optimizer.step).parameters)


def check_optimizer(optimizer: Optimizer, num_devices: int) -> None:
    """Raise ConfigError for an optimizer that cannot work on several devices."""
    if num_devices > 1 and isinstance(optimizer, torch.optim.LBFGS):
        raise ConfigError(
            "LBFGS computes the loss as often as its value demands, which differs between the "
            f"{num_devices} devices: set trainer.devices=1, or use another optimizer."
        )


def _tensor_versions(optimizer: Optimizer) -> list[tuple[int, int, int]]:
    """Return numbers that change if a parameter or its gradient is modified or replaced."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [(p._version, id(p.grad), -1 if p.grad is None else p.grad._version) for p in parameters]


def _can_bypass_hooks(trainer: Any) -> bool:
    """Whether backward and optimizer step can be called without Lightning's hooks around them."""
    has_step_hooks = any(
        is_overridden(hook, callback, pl.Callback)
        for callback in trainer.callbacks
        for hook in STEP_HOOKS
    )
    return (
        not has_step_hooks
        and isinstance(trainer.strategy, SingleDeviceStrategy)
        and isinstance(trainer.profiler, PassThroughProfiler)
        and getattr(trainer.precision_plugin, "scaler", None) is None
    )
