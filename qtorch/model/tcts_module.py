"""Trains TCTS: a second network learns by which label each sample teaches the main task most."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from qtorch.core.errors import ConfigError, unknown_name
from qtorch.data.batches import Batch
from qtorch.data.sample_set import Samples
from qtorch.metrics.loss import Loss, mean_of
from qtorch.model.factories import optimizer_factory, with_rate
from qtorch.model.module import ScoreModule
from qtorch.nn.tcts import TCTS, TaskWeights

MODES = ("soft", "hard")
REACH = 0.01  # how far the weights are moved to see what that does to the losses


class TCTSModule(ScoreModule):
    """A ScoreModule with two levels. Below, the network learns the labels of all horizons, each
    sample's losses weighted by `TaskWeights` ("soft"), or the one that weighs most ("hard").
    Above, each `steps` optimizer steps, the weights learn, with an optimizer of their own
    (`weight_optimizer`, `weight_lr`), so that the loss of the main task, the first label column,
    falls on samples drawn from the valid segment.

    The gradient of the upper level is that of a step ahead: a label's weight rises where a step on
    its loss goes down the valid loss too. With v the valid loss's gradient over its norm, that is
    the slope of each training loss along v, taken as the difference of two forward passes with
    the network's weights moved by v; no second derivative is needed. (Liu et al., "DARTS", 2019;
    Ren et al., "Learning to Reweight Examples", 2018.)

    The valid segment takes part in the training: its own figures are not out of sample. Both
    networks and both optimizers are in the checkpoints; to predict the weights are not needed.

    Differences from Qlib's: it holds one number, the valid loss of a batch, against the choices
    made on valid samples, which taught nothing, and so learns to weigh all labels alike; here the
    training samples' own labels are judged. The errors shown are the network's own of the moment
    (Qlib's those at the epoch's begin below, of the moment above); an epoch takes each sample
    once, tails too (Qlib passes `steps` times over the training data, then over the valid data);
    samples that lack a label are taught by the others; a training is not begun anew with other
    seeds until its valid loss is below a bound.
    """

    undivided: ClassVar[str | None] = (
        "its upper level draws valid samples for a whole batch and has an optimizer of its own"
    )

    def __init__(
        self,
        *arguments: Any,
        weight_optimizer: Any = "Adam",
        weight_lr: float = 1e-3,
        weight_hidden_size: int = 64,
        weight_layers: int = 2,
        weight_dropout: float = 0.0,
        steps: int = 3,
        mode: str = "soft",
        **named: Any,
    ) -> None:
        super().__init__(*arguments, **named)
        if mode not in MODES:
            raise ConfigError(unknown_name("mode", mode, MODES))
        if steps < 1:
            raise ConfigError(f"steps is {steps}; expected one optimizer step or more.")
        self.weight_factory = optimizer_factory(with_rate(weight_optimizer, weight_lr))
        self.weight_form = (weight_hidden_size, weight_layers, weight_dropout)
        self.steps, self.mode = steps, mode

    def bind(self, train: Samples, valid: Samples | None) -> None:
        network, num_tasks = self.trains(TCTS), len(train.label_names)
        if num_tasks < 2 or network.num_outputs != num_tasks:
            raise ConfigError(
                f"TCTS learns by labels of several horizons; there are {num_tasks} label columns "
                f"and {network.num_outputs} outputs. Give the handler several labels, the main "
                "one first."
            )
        if valid is None:
            raise ConfigError("TCTS weighs its labels by the segment 'valid', which is not there.")
        if not isinstance(self.loss, Loss):
            raise ConfigError(f"the loss {type(self.loss).__name__} says nothing of single labels.")
        try:
            self.loss.elementwise(torch.zeros(1), torch.zeros(1))
        except NotImplementedError as error:
            raise ConfigError(f"TCTS weighs single labels, but {error}.") from error
        self._valid = valid
        num_inputs = train.num_features * train.num_steps
        self.task_weights = TaskWeights(num_inputs, num_tasks, *self.weight_form).to(train.device)

    def learnt(self) -> list[nn.Parameter]:
        return [p for p in self.network.parameters() if p.requires_grad]

    def further_optimizers(self) -> list[Optimizer]:
        return [self.weight_factory(self.task_weights.parameters())]

    def loss_sums(
        self, batch: Batch, state: Any = None, *, complete: bool = False
    ) -> tuple[Tensor, Tensor | int, Tensor]:
        """Of the main task alone."""
        score = self.feeder(batch, state)
        assert batch.y is not None, "a valid sample has labels"
        weight, target = batch.weight, batch.y[..., 0]
        assert isinstance(self.loss, Loss), "asked in bind"
        return (*self.loss.sums(score[..., 0], target, weight, batch.mask), score)

    def training_sums(self, batch: Batch) -> tuple[Tensor, Tensor | int]:
        batch = self.to_learn(batch).flat()
        if self.trainer.global_step % self.steps == 0:
            with torch.autocast(self.device.type, enabled=False):
                self._learn_weights(batch)
        score = self.feeder(batch)
        with torch.no_grad():
            share = self._weights(batch, score)
            if self.mode == "hard":
                most = share.argmax(-1, keepdim=True)
                share = share.sum(-1, keepdim=True) * torch.zeros_like(share).scatter_(1, most, 1.0)
            if batch.weight is not None:
                share = share * batch.weight[:, None]
        return (self._losses(batch, score) * share).sum(), share.sum()

    def _weights(self, batch: Batch, score: Tensor) -> Tensor:
        label = batch.y
        assert label is not None, "a training sample has labels"
        x = batch.x.to(score.dtype)
        found: Tensor = self.task_weights(x, score.detach(), label.to(score.dtype))
        return found

    def _losses(self, batch: Batch, score: Tensor) -> Tensor:
        """`[B, Q]`, zero where there is no label."""
        label = batch.y
        assert label is not None, "a training sample has labels"
        assert isinstance(self.loss, Loss), "asked in bind"
        there = ~label.isnan()
        target = label.nan_to_num().to(score.dtype)
        return self.loss.elementwise(torch.where(there, score, 0.0), target) * there

    def _learn_weights(self, batch: Batch) -> None:
        """One step of the upper level."""
        valid, learnt = self._valid, self.learnt()
        rows = torch.randint(len(valid), (len(batch.date),), device=valid.index_device)
        above = valid.batch(rows)
        if valid.store == "host":
            above = valid.sent(above)
        total, share, _ = self.loss_sums(above)
        slope = torch.autograd.grad(mean_of(total, torch.as_tensor(share)), learnt)
        gain, score = self._gains(batch, learnt, slope)
        lost = -(self._weights(batch, score) * gain).sum(-1).mean()
        optimizers = self.optimizers()
        assert isinstance(optimizers, list)
        own = optimizers[1].optimizer
        lost.backward()  # type: ignore[no-untyped-call]  # torch's own
        own.step()
        own.zero_grad()

    @torch.no_grad()
    def _gains(
        self, batch: Batch, learnt: list[nn.Parameter], slope: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        """How fast each training loss `[B, Q]` grows along `slope`, and the scores `[B, Q]`."""
        length = torch.stack([s.square().sum() for s in slope]).sum().sqrt().clamp(min=1e-12)
        move = [s * (REACH / length) for s in slope]
        kept = [p.clone() for p in learnt]
        training = self.network.training
        self.network.eval()  # the two passes must not differ by what dropout takes away
        score = self.feeder(batch)
        found = []
        for sign in (1.0, -1.0):
            for parameter, old, step in zip(learnt, kept, move, strict=True):
                parameter.copy_(old).add_(step, alpha=sign)
            found.append(self._losses(batch, self.feeder(batch)))
        for parameter, old in zip(learnt, kept, strict=True):
            parameter.copy_(old)
        self.network.train(training)
        return (found[0] - found[1]) / (2 * REACH), score
