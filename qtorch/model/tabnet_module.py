"""Trains TabNet in two phases: hidden features are guessed from the others, then labels."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from qtorch.core.errors import ConfigError
from qtorch.data.batches import Batch
from qtorch.data.sample_set import Samples
from qtorch.metrics.loss import mean_of
from qtorch.model.module import PRETRAIN_VALID, ScoreModule
from qtorch.model.step_loader import Steps
from qtorch.model.tally import weighted_mean
from qtorch.nn.tabnet import TabNet

PRETRAINED = "qtorch_pretrained"
FLAT = 1e-8  # a variance below it is none


class TabNetModule(ScoreModule):
    """A ScoreModule whose first `pretrain_epochs` epochs learn without labels.

    There a share `ps` of each row's features is hidden and a decoder guesses them. The loss is
    the squared error over the variance of the feature in its batch, the mean over what is
    hidden: 1 is a guess of the mean. It is told as `train/pretrain_loss` and, with hidden
    features that are the same in each epoch, as `valid/pretrain_loss`. The weights of the epoch
    with the least of the latter (without a valid segment: of the last) go on into training,
    with an optimizer that begins anew; the decoder goes no further. These epochs are added to
    the trainer's `max_epochs`; a fine-tuning has none of them.

    `lambda_sparse` is the weight of the entropy of what was picked, the less the sparser.

    Source and differences: "Tabular Self-Supervised Learning" in Arik and Pfister, AAAI 2021;
    Qlib's pytorch_tabnet.py divides by the spread of what was guessed instead of the features',
    early-stops pretraining by the same patience, and has no entropy in its loss.
    """

    undivided: ClassVar[str | None] = (
        "its batch norms and its pretraining take statistics over a whole batch"
    )

    def __init__(
        self,
        *arguments: Any,
        pretrain_epochs: int = 50,
        ps: float = 0.3,
        lambda_sparse: float = 0.0,
        **named: Any,
    ) -> None:
        super().__init__(*arguments, **named)
        if pretrain_epochs < 0:
            raise ConfigError(f"pretrain_epochs is {pretrain_epochs}; expected 0 or more.")
        if not 0 < ps < 1:
            raise ConfigError(f"ps is {ps}; it is the share of features that are hidden.")
        self.pretraining_epochs = pretrain_epochs
        self.ps, self.lambda_sparse = ps, lambda_sparse
        self.best_pretrained: dict[str, Any] = {"loss": math.inf, "weights": None}

    def bind(self, train: Samples, valid: Samples | None) -> None:
        if self.pretraining_epochs or self.lambda_sparse:
            network = self.trains(TabNet)
        if self.pretraining_epochs:
            self.decoder = network.decoder()

    def training_sums(self, batch: Batch) -> tuple[Tensor, Tensor | int]:
        if self.pretrains:
            return self.guess_sums(batch)
        if not self.lambda_sparse:
            return super().training_sums(batch)
        batch = self.to_learn(batch)
        x, there = self._rows(batch)
        with self.acting(TabNet) as network:
            found, entropy = network.encode(x)
            score = network.scores(network.fc_out(found))
        total, share = self.sums_of(score.reshape(*batch.date.shape, *score.shape[1:]), batch)
        entropy = mean_of((entropy * there[:, 0]).sum(), there.sum())
        return total + self.lambda_sparse * entropy * share, share

    def guess_sums(self, batch: Batch, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        """`(sum of squared errors over variances, count)` of features hidden by chance."""
        x, there = self._rows(batch)
        chance = torch.rand(x.shape, device=x.device, dtype=x.dtype, generator=generator)
        hidden = (chance < self.ps) * there
        found = self.decoder(self.trains(TabNet).encode(x * (1 - hidden), 1 - hidden)[0])
        count = there.sum().clamp(min=1)
        mean = (x * there).sum(0) / count
        variance = ((x - mean) * there).square().sum(0) / count
        # What is the same in the whole batch teaches nothing, and has nothing to divide by.
        hidden = hidden * (variance > FLAT)
        error = (found.float() - x).square() / variance.clamp(min=FLAT)
        return (error * hidden).sum(), hidden.sum()

    def _rows(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The rows `x [B, F]` that the network is given, and which of them are samples, `[B, 1]`
        of 1 and 0."""
        (x,), _ = self.feeder.arguments(batch)
        mask = batch.mask
        return x, torch.ones_like(x[:, :1]) if mask is None else mask.reshape(-1, 1).to(x.dtype)

    # -- the end of pretraining ----------------------------------------------------------------

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        if self.current_epoch + 1 != self.pretraining_epochs:
            return
        # Before the epoch's checkpoint is written, so that it is one of the phase to come.
        if self.best_pretrained["weights"] is not None:
            self.network.load_state_dict(self.best_pretrained["weights"])
            self.best_pretrained["weights"] = None
        self.trainer.optimizers[0].state.clear()

    # -- validation ----------------------------------------------------------------------------

    def validation_step(self, steps: Steps) -> None:
        if not self.pretrains:
            super().validation_step(steps)
            return
        for batch in steps:
            self.valid_tally.add(*self.guess_sums(batch, self._generator))

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._generator = Generator(self.device).manual_seed(0)

    def on_validation_epoch_end(self) -> None:
        if not self.pretrains:
            super().on_validation_epoch_end()
            return
        loss = weighted_mean(*self.valid_tally.sums().tolist())
        self._tell({PRETRAIN_VALID: loss})
        if loss < self.best_pretrained["loss"]:
            weights = {k: v.detach().clone() for k, v in self.network.state_dict().items()}
            self.best_pretrained = {"loss": loss, "weights": weights}

    # -- for Lightning -------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[PRETRAINED] = self.best_pretrained

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.best_pretrained = checkpoint[PRETRAINED]
