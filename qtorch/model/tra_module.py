"""Trains TRA: optimal transport gives the samples to predictors, the router learns where."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from qtorch.core.errors import ConfigError
from qtorch.data.batches import Batch
from qtorch.data.sample_set import Samples
from qtorch.metrics.loss import mean_of
from qtorch.model.error_memory import ErrorMemory, errors_of
from qtorch.model.module import ScoreModule
from qtorch.nn.tra import TRA, minmax, sinkhorn

DECAY_STEPS = 100  # of `rho`


class TRAModule(ScoreModule):
    """A ScoreModule whose loss is that of the routed predictions and `lamb` times the
    cross-entropy between the router and the transport plan of each batch.

    The plan's cost is the scaled error of each predictor, mixed by `alpha` with its mean error of
    the past (1: of the past nothing). `lamb` decays by `rho` each 100 steps. In the first
    `pretrain` epochs the plan itself routes the loss, and the router learns nothing.

    The errors of the train segment are found anew as each epoch begins, each batch writes its
    own, and they are part of the checkpoints; those of the valid segment are found before each
    validation. A prediction for date t sees the errors of dates up to t less the label's horizon.

    Differences from Qlib's: what is predicted never depends on the label of its own date (its
    transport "oracle" routes the valid and test segments by their labels), nor on what was scored
    before (its memory is the dataset's, and empty where a model is loaded); samples without a
    label are in neither plan, loss nor memory; a batch of one works, no tail is dropped.
    """

    errors: Tensor

    undivided: ClassVar[str | None] = (
        "its transport plan spreads all samples of a batch over the predictors, and "
        "its memory takes their errors"
    )

    def __init__(
        self,
        *arguments: Any,
        lamb: float = 1.0,
        rho: float = 1.0,
        alpha: float = 1.0,
        pretrain: int = 0,
        **named: Any,
    ) -> None:
        super().__init__(*arguments, **named)
        if not 0 <= alpha <= 1 or not 0 <= rho <= 1:
            raise ConfigError(f"alpha {alpha} and rho {rho} must lie between 0 and 1.")
        if self.day_label is not None:
            raise ConfigError(
                "TRA remembers its errors on the dataset's own labels: leave out day_label, and "
                "let a processor treat them (CSZScoreNorm, CSRankNorm)."
            )
        self.lamb, self.rho, self.alpha, self.pretrain = lamb, rho, alpha, pretrain

    def bind(self, train: Samples, valid: Samples | None) -> None:
        network = self.trains(TRA)
        if train.horizon is not None and train.horizon > network.label_horizon:
            raise ConfigError(
                f"label_horizon of TRA is {network.label_horizon}, but the labels look "
                f"{train.horizon} days ahead: errors would be seen before they are known."
            )
        self._train, self._valid = train, valid
        self.memory = ErrorMemory(network, train)
        self.register_buffer("errors", self.memory.values)
        if valid is not None:
            self.valid_memory = ErrorMemory(network, valid)

    def on_train_start(self) -> None:
        super().on_train_start()
        self.memory.values = self.errors  # the module may have moved

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.memory.learn(self.network, self._train)

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        assert self._valid is not None, "there is a valid segment to validate on"
        self.valid_memory.learn(self.network, self._train)  # its last days
        self.valid_memory.learn(self.network, self._valid)

    def loss_sums(self, batch: Batch, state: Any = None, *, complete: bool = False) -> Any:
        """As ever, with the errors that the valid segment's samples may see."""
        return super().loss_sums(_recalled(batch, self.valid_memory), state, complete=complete)

    def training_sums(self, batch: Batch) -> tuple[Tensor, Tensor | int]:
        flat = batch.flat()
        (x,), named = self.feeder.arguments(_recalled(flat, self.memory))
        with self.acting(TRA) as network:
            found, logits = network.patterns(x, **named)
        error, known = errors_of(found, flat)
        with torch.no_grad():
            fresh = minmax(error)
            past = minmax(named["errors"].mean(1))
            plan = sinkhorn(minmax(self.alpha * fresh + (1 - self.alpha) * past), known)
            self.memory.write(flat.date, flat.instrument, fresh, known)
        if self.current_epoch < self.pretrain:
            weight = known if flat.weight is None else known * flat.weight
            return ((error * plan).sum(1) * weight).sum(), weight.sum()
        chosen = F.gumbel_softmax(logits.float(), hard=True)
        score = network.routed(found, chosen)
        total, share = self.sums_of(
            score.reshape(*batch.date.shape, *score.shape[1:]), batch, complete=self.complete
        )
        missed = -(plan * logits.float().log_softmax(-1)).sum()
        lamb = self.lamb * self.rho ** (self.trainer.global_step // DECAY_STEPS)
        return total + lamb * share * mean_of(missed, known.sum()), share


def _recalled(batch: Batch, memory: ErrorMemory) -> Batch:
    return replace(
        batch, extra={**batch.extra, "errors": memory.gather(batch.date, batch.instrument)}
    )
