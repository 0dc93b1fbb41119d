"""A user's LightningModule as one of several ranks."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.data import extract_batch_size
from torch import Tensor

from qtorch.data.batches import Batch
from qtorch.model.rank_group import RankGroup

LOG = inspect.signature(pl.LightningModule.log)


class UserModuleRescaler(pl.Callback):
    """Rescale a user module's loss and metrics so that DDP matches one device.

    The loss is taken to be the mean over the rows of the rank's batch. Its backward is scaled by
    the rank's part of the rows, so that the averaged gradients are those of the whole batch. A
    module whose loss is another mean (over days, or over weighted rows) returns the number of items
    that it averages over from a method `weight_of(batch)`.

    Logged metrics are reduced over the ranks as Lightning reduces them over batches, by `reduce_fx`
    and `batch_size`, so that best epoch, early stopping and schedulers see the same value on every
    rank. Every rank must log a metric, except with `rank_zero_only`.
    """

    def __init__(self, ranks: RankGroup) -> None:
        self.ranks = ranks
        self._loss_scale = torch.ones(())

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        pl_module.backward = self._scale_backward(pl_module.backward)  # type: ignore[method-assign]
        pl_module.log = self._sync_log(pl_module.log, pl_module)  # type: ignore[method-assign]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        get_weight = getattr(pl_module, "weight_of", _num_rows)
        weight = torch.as_tensor(get_weight(batch), dtype=torch.float64).to(pl_module.device)
        self._loss_scale = weight * self.ranks.size / self.ranks.sum(weight)

    def _scale_backward(self, backward: Callable[..., None]) -> Callable[..., None]:
        def backward_with_scale(loss: Tensor, *args: Any, **keywords: Any) -> None:
            backward(loss * self._loss_scale.to(loss.dtype), *args, **keywords)

        return backward_with_scale

    def _sync_log(
        self, log: Callable[..., None], module: pl.LightningModule
    ) -> Callable[..., None]:
        def log_with_sync(*args: Any, **keywords: Any) -> None:
            log_arguments = LOG.bind(module, *args, **keywords).arguments
            del log_arguments["self"]
            if not log_arguments.get("rank_zero_only"):
                size = log_arguments.get("batch_size")
                if size is None:
                    batch = getattr(module.trainer._results, "batch", None)
                    size = 1 if batch is None else extract_batch_size(batch)
                # Lightning averages the batch sizes over the ranks too, and truncates the mean.
                log_arguments |= {"sync_dist": True, "batch_size": size * self.ranks.size}
            log(**log_arguments)

        return log_with_sync


def _num_rows(batch: Any) -> int:
    return batch.num_samples if isinstance(batch, Batch) else extract_batch_size(batch)
