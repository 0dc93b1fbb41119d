"""Networks as users may write them: a torch module, and LightningModules that train themselves."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from qtorch.data.dataset.batch import Batch
from qtorch.model import ScoreModule


class LastStep(nn.Module):
    """A linear model of the newest step, which is no qtorch class."""

    def __init__(self, d_feat: int, step_len: int = 0) -> None:
        super().__init__()
        self.linear = nn.Linear(d_feat, 1)
        self.step_len = step_len

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x[:, -1])


class UserModule(pl.LightningModule):
    """A LightningModule for Batches that logs its own metrics and returns scores."""

    def __init__(self, d_feat: int, lr: float = 0.05, dropout: float = 0.2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Dropout(dropout), nn.Linear(d_feat, 1))
        self.lr = lr

    def scores(self, batch: Batch) -> Tensor:
        return self.net(batch.x[:, -1])[:, 0]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = nn.functional.mse_loss(self.scores(batch), batch.y[:, 0])
        self.log("own_loss", loss, on_step=False, on_epoch=True, batch_size=len(batch.x))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        loss = nn.functional.mse_loss(self.scores(batch), batch.y[:, 0])
        self.log("own_valid_loss", loss, batch_size=len(batch.x))

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.scores(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class LoggingModule(UserModule):
    """Log in every way that Lightning offers.

    By step and by epoch, reduced by mean, sum and max, from the start of the epoch, and with a
    torchmetrics metric, which has state.
    """

    def __init__(self, d_feat: int, lr: float = 0.05) -> None:
        super().__init__(d_feat, lr)
        self.average = MeanMetric()

    def on_train_epoch_start(self) -> None:
        self.log("begun", float(self.global_step))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        size = len(batch.x)
        self.average.update(loss.detach(), size)
        self.log("average", self.average, on_step=False, on_epoch=True)
        self.log("loss", loss, on_step=True, on_epoch=True, batch_size=size, prog_bar=True)
        self.log("most", loss, on_step=False, on_epoch=True, reduce_fx="max", batch_size=size)
        self.log("total", loss, on_step=False, on_epoch=True, reduce_fx=sum, sync_dist=True)
        if batch_idx < 2:
            self.log("early", loss, on_step=False, on_epoch=True, batch_size=size)
        return loss


class OneScoreNetwork(nn.Module):
    """A network that wrongly returns one number for a whole batch."""

    def __init__(self, d_feat: int) -> None:
        super().__init__()
        self.linear = nn.Linear(d_feat, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x[:, -1]).mean()


class ReversedInputs(ScoreModule):
    """A module whose predictions see the features in another order."""

    @classmethod
    def prepare_prediction(cls, network, samples, load_labeled):
        labeled = load_labeled(slice(None))
        assert labeled.target is not None
        return samples.with_features(samples.feature_names[::-1])
