"""Lightning's progress bar, counting batches even if a training step has several of them."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import RichProgressBar

from qtorch.model.step_loader import StepLoader


class BatchProgressBar(RichProgressBar):
    """A rich progress bar that counts the batches of the training loader."""

    def __init__(self, loader: StepLoader) -> None:
        super().__init__()
        self.loader = loader

    @property
    def total_train_batches(self) -> int:
        return self.loader.num_batches

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        batch_number = self.loader.position - 1
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_number)
