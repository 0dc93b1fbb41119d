"""A user's LightningModule as one of several ranks."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.data import extract_batch_size
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from qtorch.core.errors import refuse_old_names
from qtorch.data.dataset.batch import Batch
from qtorch.model.loop.lightning_internals import current_batch
from qtorch.model.loop.rank_group import RankGroup

LOG = inspect.signature(pl.LightningModule.log)


class UserModuleRescaler(pl.Callback):
    """Rescale a user module's gradients and metrics so that DDP matches one device.

    The loss is taken to be the mean over the rows of the rank's batch. Its gradient is scaled by
    the rank's part of the rows, so that the averaged gradients are those of the whole batch. A
    module whose loss is another mean (over days, or over weighted rows) returns the number of items
    that it averages over from a method `batch_weight(batch)`.

    Logged metrics are reduced over the ranks as Lightning reduces them over batches, by `reduce_fx`
    and `batch_size`, so that best epoch, early stopping and schedulers see the same value on every
    rank. Every rank must log a metric, except with `rank_zero_only`. The module's `log` is wrapped
    for this, because Lightning has no hook between a module's call of `log` and its result.
    """

    def __init__(self, ranks: RankGroup) -> None:
        self.ranks = ranks
        self._loss_scale = torch.ones(())
        self._gradient_hook: RemovableHandle | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        refuse_old_names(pl_module, {"weight_of": "batch_weight"})
        pl_module.log = self._sync_log(pl_module.log, pl_module)  # type: ignore[method-assign]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        get_weight = getattr(pl_module, "batch_weight", _num_rows)
        weight = torch.as_tensor(get_weight(batch), dtype=torch.float64).to(pl_module.device)
        self._loss_scale = weight * self.ranks.size / self.ranks.sum(weight)

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        scale = self._loss_scale.to(loss.dtype)
        handle: RemovableHandle = loss.register_hook(lambda gradient: gradient * scale)  # type: ignore[no-untyped-call]  # untyped in torch
        self._gradient_hook = handle

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._gradient_hook is not None:
            self._gradient_hook.remove()  # a retained loss may go backward again

    def _sync_log(
        self, log: Callable[..., None], module: pl.LightningModule
    ) -> Callable[..., None]:
        def log_with_sync(*args: Any, **keywords: Any) -> None:
            log_arguments = LOG.bind(module, *args, **keywords).arguments
            del log_arguments["self"]
            if not log_arguments.get("rank_zero_only"):
                size = log_arguments.get("batch_size")
                if size is None:
                    batch = current_batch(module.trainer)
                    size = 1 if batch is None else extract_batch_size(batch)
                # Lightning averages the batch sizes over the ranks too, and truncates the mean.
                log_arguments |= {"sync_dist": True, "batch_size": size * self.ranks.size}
            log(**log_arguments)

        return log_with_sync


def _num_rows(batch: Any) -> int:
    return batch.num_samples if isinstance(batch, Batch) else extract_batch_size(batch)
