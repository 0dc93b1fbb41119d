"""Training step of TCTS: a second network learns which label to train each sample on."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from qtorch.core.errors import ConfigError, check_name
from qtorch.data.dataset.batch import Batch
from qtorch.data.dataset.samples import Samples
from qtorch.metrics.loss import Loss, mean_from_sums
from qtorch.model.loop.factories import optimizer_factory, with_learning_rate
from qtorch.model.loop.module import ScoreModule
from qtorch.nn.temporal.tcts import TCTS, TaskWeights

MODES = ("soft", "hard")
STEP_LENGTH = 0.01  # how far the weights are moved for a finite difference of the losses


class TCTSModule(ScoreModule):
    """A ScoreModule with bi-level training.

    At the lower level, the network learns the labels of all horizons; each sample's losses are
    weighted by `TaskWeights` (mode "soft"), or only the loss with the largest weight is used
    ("hard"). At the upper level, every `steps` optimizer steps, the task weights are trained with
    an optimizer of their own (`weight_optimizer`, `weight_lr`) to reduce the loss of the main task,
    the first label column, on samples drawn from the valid segment.

    The gradient of the upper level is that of one step ahead: a label's weight rises if a step on
    its loss also reduces the valid loss. With v the normalized gradient of the valid loss, this is
    the slope of each training loss along v, computed as the difference of two forward passes with
    the network's weights moved by v; no second derivative is needed. (Liu et al., "DARTS", 2019;
    Ren et al., "Learning to Reweight Examples", 2018.)

    The valid segment takes part in training, so its metrics are not out of sample. Both networks
    and both optimizers are saved in checkpoints; prediction does not need the task weights.

    Differences from Qlib: Qlib compares the valid loss of a batch, one number, with the choices
    made on valid samples, on which the network was not trained, and so learns to weight all labels
    equally; here the labels of training samples are judged. Errors are shown to the task weights as
    of the current network (Qlib: as of the start of the epoch at the lower level, current at the
    upper level). An epoch uses each sample once, including the last incomplete batch (Qlib passes
    `steps` times over the training data, then over the valid data). Samples that lack some labels
    are trained on the others. Training is not restarted with other seeds until the valid loss falls
    below a bound.
    """

    single_device_reason: ClassVar[str | None] = (
        "its upper level draws valid samples for a whole batch and has an optimizer of its own"
    )

    def __init__(
        self,
        *args: Any,
        weight_optimizer: Any = "Adam",
        weight_lr: float = 1e-3,
        weight_hidden_size: int = 64,
        weight_layers: int = 2,
        weight_dropout: float = 0.0,
        steps: int = 3,
        mode: str = "soft",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        check_name("mode", mode, MODES)
        if steps < 1:
            raise ConfigError(f"steps is {steps}; expected at least 1 optimizer step.")
        self.weight_factory = optimizer_factory(with_learning_rate(weight_optimizer, weight_lr))
        self.weight_network_arguments = (weight_hidden_size, weight_layers, weight_dropout)
        self.steps, self.mode = steps, mode

    def bind(self, train: Samples, valid: Samples | None) -> None:
        network, num_tasks = self.require_network(TCTS), len(train.label_names)
        if num_tasks < 2 or network.num_outputs != num_tasks:
            raise ConfigError(
                f"TCTS needs labels of several horizons, but there are {num_tasks} label columns "
                f"and {network.num_outputs} outputs. Configure several labels in the handler, the "
                "main one first."
            )
        if valid is None:
            raise ConfigError(
                "TCTS weights its labels by the segment 'valid', which the dataset does not have."
            )
        if not isinstance(self.loss, Loss):
            raise ConfigError(
                f"TCTS weights single labels, but the loss {type(self.loss).__name__} is not "
                "element-wise: it has to derive from qtorch.metrics.loss.Loss."
            )
        self._valid = valid
        num_inputs = train.num_features * train.num_steps
        task_weights = TaskWeights(num_inputs, num_tasks, *self.weight_network_arguments)
        self.task_weights = task_weights.to(train.device)

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.network.parameters() if p.requires_grad]

    def extra_optimizers(self) -> list[Optimizer]:
        return [self.weight_factory(self.task_weights.parameters())]

    def loss_sums(
        self, batch: Batch, state: Any = None, *, complete: bool = False
    ) -> tuple[Tensor, Tensor | int, Tensor]:
        """Return the loss sums and scores of the main task only."""
        score = self.forward_adapter(batch, state)
        assert batch.y is not None, "a valid sample has labels"
        assert isinstance(self.loss, Loss), "checked in bind"
        sums = self.loss.sums(score[..., 0], batch.y[..., 0], batch.weight, batch.mask)
        return (*sums, score)

    def training_sums(self, batch: Batch) -> tuple[Tensor, Tensor | int]:
        batch = self.apply_day_label(batch).flatten()
        if self.trainer.global_step % self.steps == 0:
            with torch.autocast(self.device.type, enabled=False):
                self._step_task_weights(batch)
        score = self.forward_adapter(batch)
        with torch.no_grad():
            task_weights = self._task_weights(batch, score)
            if self.mode == "hard":
                best_task = task_weights.argmax(-1, keepdim=True)
                is_best = torch.zeros_like(task_weights).scatter_(1, best_task, 1.0)
                task_weights = task_weights.sum(-1, keepdim=True) * is_best
            if batch.weight is not None:
                task_weights = task_weights * batch.weight[:, None]
        return (self._task_losses(batch, score) * task_weights).sum(), task_weights.sum()

    def _task_weights(self, batch: Batch, score: Tensor) -> Tensor:
        assert batch.y is not None, "a training sample has labels"
        x, label = batch.x.to(score.dtype), batch.y.to(score.dtype)
        weights: Tensor = self.task_weights(x, score.detach(), label)
        return weights

    def _task_losses(self, batch: Batch, score: Tensor) -> Tensor:
        """Return the losses `[B, Q]`, zero where the label is NaN."""
        assert batch.y is not None, "a training sample has labels"
        assert isinstance(self.loss, Loss), "checked in bind"
        has_label = ~batch.y.isnan()
        target = batch.y.nan_to_num().to(score.dtype)
        return self.loss.elementwise(torch.where(has_label, score, 0.0), target) * has_label

    def _step_task_weights(self, batch: Batch) -> None:
        """Do one optimizer step of the upper level."""
        valid, parameters = self._valid, self.trainable_parameters()
        rows = torch.randint(len(valid), (len(batch.date),), device=valid.index_device)
        valid_batch = valid.send_to_device(valid.batch(rows))
        total, total_weight, _ = self.loss_sums(valid_batch)
        valid_loss = mean_from_sums(total, torch.as_tensor(total_weight))
        valid_gradient = torch.autograd.grad(valid_loss, parameters)
        loss_slopes, score = self._loss_slopes(batch, parameters, valid_gradient)
        loss = -(self._task_weights(batch, score) * loss_slopes).sum(-1).mean()
        optimizers = self.optimizers()
        assert isinstance(optimizers, list)
        weight_optimizer = optimizers[1].optimizer
        loss.backward()  # type: ignore[no-untyped-call]  # untyped in torch
        weight_optimizer.step()
        weight_optimizer.zero_grad()

    @torch.no_grad()
    def _loss_slopes(
        self, batch: Batch, parameters: list[nn.Parameter], valid_gradient: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        """Return the slopes of the training losses `[B, Q]`, and the scores `[B, Q]`.

        A slope is that of a loss along the normalized `valid_gradient`.
        """
        norm = torch.stack([s.square().sum() for s in valid_gradient]).sum().sqrt().clamp(min=1e-12)
        steps = [s * (STEP_LENGTH / norm) for s in valid_gradient]
        original_values = [p.clone() for p in parameters]
        was_training = self.network.training
        self.network.eval()  # the two passes must not differ by their dropout masks
        score = self.forward_adapter(batch)
        losses = []
        for sign in (1.0, -1.0):
            for parameter, value, step in zip(parameters, original_values, steps, strict=True):
                parameter.copy_(value).add_(step, alpha=sign)
            losses.append(self._task_losses(batch, self.forward_adapter(batch)))
        for parameter, value in zip(parameters, original_values, strict=True):
            parameter.copy_(value)
        self.network.train(was_training)
        return (losses[0] - losses[1]) / (2 * STEP_LENGTH), score
