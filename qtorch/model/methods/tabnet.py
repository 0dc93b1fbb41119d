"""Training step of TabNet: self-supervised pretraining on hidden features, then on labels."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from qtorch.core.errors import ConfigError
from qtorch.data.dataset.batch import Batch
from qtorch.data.dataset.samples import Samples
from qtorch.metrics.loss import mean_from_sums
from qtorch.model.loop.loader import StepBatches, unpack_batches
from qtorch.model.loop.module import ScoreModule
from qtorch.model.loop.progress import PRETRAIN_VALID_LOSS, mean_losses
from qtorch.nn.tabnet import TabNet

PRETRAINING_KEY = "qtorch_pretrained"
MIN_VARIANCE = 1e-8  # a feature with a smaller variance is constant


class TabNetModule(ScoreModule):
    """A ScoreModule whose first `pretrain_epochs` epochs train without labels.

    In these epochs a fraction `ps` of each row's features is hidden and a decoder predicts them.
    The loss is the mean over hidden features of the squared error divided by the feature's variance
    in the batch, so that predicting the mean gives 1. It is logged as `train/pretrain_loss`, and as
    `valid/pretrain_loss` with hidden features that are the same in each epoch. Training starts from
    the weights of the epoch with the lowest valid loss (of the last epoch if there is no valid
    segment) with a new optimizer state; the decoder is not used any more. Pretraining epochs are
    added to the trainer's `max_epochs`; fine-tuning has none.

    `lambda_sparse` is the weight of the entropy of the feature selection masks; lower entropy means
    sparser masks.

    Source: "Tabular Self-Supervised Learning" in Arik and Pfister, AAAI 2021. Differences from
    Qlib's pytorch_tabnet.py: it divides by the spread of the predictions instead of the features',
    stops pretraining early with the same patience, and has no entropy in its loss.
    """

    single_device_reason: ClassVar[str | None] = (
        "its batch norms and its pretraining compute statistics over a whole batch"
    )

    def __init__(
        self,
        *args: Any,
        pretrain_epochs: int = 50,
        ps: float = 0.3,
        lambda_sparse: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if pretrain_epochs < 0:
            raise ConfigError(f"pretrain_epochs is {pretrain_epochs}; expected 0 or more.")
        if not 0 < ps < 1:
            raise ConfigError(
                f"ps is {ps}; expected a fraction of hidden features between 0 and 1."
            )
        self.pretraining_epochs = pretrain_epochs
        self.ps, self.lambda_sparse = ps, lambda_sparse
        self.best_pretraining: dict[str, Any] = {"loss": math.inf, "weights": None}

    def bind(self, train: Samples, valid: Samples | None) -> None:
        if self.pretraining_epochs or self.lambda_sparse:
            network = self.require_network(TabNet)
        if self.pretraining_epochs:
            self.decoder = network.decoder()

    def training_sums(self, batch: Batch) -> tuple[Tensor, Tensor | int]:
        if self.is_pretraining:
            return self.pretraining_sums(batch)
        if not self.lambda_sparse:
            return super().training_sums(batch)
        batch = self.apply_day_label(batch)
        x, is_sample = self._rows(batch)
        with self.effective_network(TabNet) as network:
            decision, entropy = network.encode(x)
            score = network.scores(network.fc_out(decision))
        score = score.reshape(*batch.date.shape, *score.shape[1:])
        total, total_weight = self.loss_sums_from_scores(score, batch)
        entropy = mean_from_sums((entropy * is_sample[:, 0]).sum(), is_sample.sum())
        return total + self.lambda_sparse * entropy * total_weight, total_weight

    def pretraining_sums(
        self, batch: Batch, generator: Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return `(sum of squared errors over variances, count)` of randomly hidden features."""
        x, is_sample = self._rows(batch)
        random_values = torch.rand(x.shape, device=x.device, dtype=x.dtype, generator=generator)
        hidden = (random_values < self.ps) * is_sample
        network = self.require_network(TabNet)
        encoding = network.encode_rows(x * (1 - hidden), 1 - hidden)
        predictions = self.decoder(encoding)
        count = is_sample.sum().clamp(min=1)
        mean = (x * is_sample).sum(0) / count
        variance = ((x - mean) * is_sample).square().sum(0) / count
        # A feature that is constant in the batch has no variance to divide by; skip it.
        hidden = hidden * (variance > MIN_VARIANCE)
        error = (predictions.float() - x).square() / variance.clamp(min=MIN_VARIANCE)
        return (error * hidden).sum(), hidden.sum()

    def _rows(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return input rows `x [B, F]`, and a mask `[B, 1]`: 1 for samples, 0 for padding."""
        (x,), _ = self.forward_adapter.arguments(batch)
        mask = batch.mask
        return x, torch.ones_like(x[:, :1]) if mask is None else mask.reshape(-1, 1).to(x.dtype)

    # -- the end of pretraining ----------------------------------------------------------------

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        if self.current_epoch + 1 != self.pretraining_epochs:
            return
        # Do this before the epoch's checkpoint is written, so that it belongs to the next phase.
        if self.best_pretraining["weights"] is not None:
            self.network.load_state_dict(self.best_pretraining["weights"])
            self.best_pretraining["weights"] = None
        self.trainer.optimizers[0].state.clear()

    # -- validation ----------------------------------------------------------------------------

    def validation_step(self, batches: StepBatches | Batch) -> None:
        if not self.is_pretraining:
            super().validation_step(batches)
            return
        for batch in unpack_batches(batches):
            self.valid_accumulator.add(*self.pretraining_sums(batch, self._generator))

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._generator = Generator(self.device).manual_seed(0)

    def on_validation_epoch_end(self) -> None:
        if not self.is_pretraining:
            super().on_validation_epoch_end()
            return
        (loss,) = mean_losses(self.valid_accumulator.sums())
        self._log_metrics([{PRETRAIN_VALID_LOSS: loss}])
        if loss < self.best_pretraining["loss"]:
            weights = {k: v.detach().clone() for k, v in self.network.state_dict().items()}
            self.best_pretraining = {"loss": loss, "weights": weights}

    # -- for Lightning -------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[PRETRAINING_KEY] = self.best_pretraining

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.best_pretraining = checkpoint[PRETRAINING_KEY]
