"""A LightningModule that trains itself, as one of several ranks."""

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


class OwnShare(pl.Callback):
    """Makes of the ranks' parts of a user's own training what it is on one device.

    A loss is taken for the mean over the rows of its batch, and weighs in its backward what the
    rank has of them: the averaged gradients are those of the whole batch. A module whose loss is
    another mean (over days, of weighted rows) says what it counts by a method
    `weight_of(batch)`. What the module logs is put together over the ranks as Lightning does it
    over batches, by its `reduce_fx` and `batch_size`, so that the best epoch, an early stop and a
    scheduler see one value at every rank. All ranks must log it, but for `rank_zero_only`.
    """

    def __init__(self, ranks: RankGroup) -> None:
        self.ranks = ranks
        self._share = torch.ones(())

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        pl_module.backward = self._weighted(pl_module.backward)  # type: ignore[method-assign]
        pl_module.log = self._of_all(pl_module.log, pl_module)  # type: ignore[method-assign]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        weight_of = getattr(pl_module, "weight_of", _num_rows)
        weight = torch.as_tensor(weight_of(batch), dtype=torch.float64).to(pl_module.device)
        self._share = weight * self.ranks.size / self.ranks.sum(weight)

    def _weighted(self, backward: Callable[..., None]) -> Callable[..., None]:
        def weighted(loss: Tensor, *args: Any, **named: Any) -> None:
            backward(loss * self._share.to(loss.dtype), *args, **named)

        return weighted

    def _of_all(self, log: Callable[..., None], module: pl.LightningModule) -> Callable[..., None]:
        def of_all(*args: Any, **named: Any) -> None:
            given = LOG.bind(module, *args, **named).arguments
            del given["self"]
            if not given.get("rank_zero_only"):
                size = given.get("batch_size")
                if size is None:
                    batch = getattr(module.trainer._results, "batch", None)
                    size = 1 if batch is None else extract_batch_size(batch)
                # Lightning takes the ranks' mean of the sizes too, and cuts off its fraction.
                given |= {"sync_dist": True, "batch_size": size * self.ranks.size}
            log(**given)

        return of_all


def _num_rows(batch: Any) -> int:
    return batch.num_samples if isinstance(batch, Batch) else extract_batch_size(batch)
