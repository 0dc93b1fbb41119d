"""Scores of all samples of a segment, in their order, without gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pandas as pd
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from qtorch.core.errors import ConfigError
from qtorch.core.heartbeat import beat
from qtorch.data.batches import Batch, BatchLoader
from qtorch.data.sample_set import Samples
from qtorch.model.feeding import Feeder

SCORE = "score"
GPU_BATCH = 8192


def evaluation_size(batch: Mapping[str, Any], device: torch.device) -> int:
    """Samples a batch where nothing is learnt: as given, else what suits the device. A CPU's
    caches like a training batch, a GPU is kept busy by a larger one."""
    if batch["eval_size"] is not None:
        return int(batch["eval_size"])
    return int(batch["size"]) if device.type == "cpu" else max(GPU_BATCH, int(batch["size"]))


def score_series(
    network: nn.Module,
    samples: Samples,
    *,
    device: torch.device,
    batch_size: int,
    readout: Callable[[Tensor], Tensor] | None = None,
) -> pd.Series:
    """A float32 Series "score" by (datetime, instrument); of several outputs what `readout`
    makes of them, by default the first.

    `network` is a network, or a LightningModule whose `predict_step(batch, batch_idx)` gives the
    scores `[B]` or `[B, Q]` of a Batch. It is left on the device and in the mode where it was.
    """
    moved = samples.to(device)
    by_day = bool(getattr(network, "cross_section", False))
    loader = BatchLoader(
        moved,
        batch_size=batch_size,
        order="day_sequential" if by_day else "sequential",
        days_per_batch=max(1, batch_size * moved.num_days // max(1, len(moved))),
    )
    with torch.inference_mode(), evaluated(network, device):
        call = batch_scorer(network)
        parts, masks = [], []
        for number, batch in enumerate(loader):
            beat("scoring")
            score = call(batch, number)
            if score.dim() > batch.date.dim():
                score = score[..., 0] if readout is None else readout(score)
            parts.append(score.flatten())
            masks.append(
                torch.ones_like(parts[-1], dtype=torch.bool)
                if batch.mask is None
                else batch.mask.flatten()
            )
        scores = torch.cat(parts)[torch.cat(masks)].float().cpu() if parts else torch.zeros(0)
    return pd.Series(scores.numpy(), index=samples.index, name=SCORE)


def batch_scorer(network: nn.Module) -> Callable[[Batch, int], Tensor]:
    """`(batch, number) -> scores` of a network or of a LightningModule, in the batch's form."""
    call: Callable[[Batch, int], Any]
    if isinstance(network, pl.LightningModule):
        call = network.predict_step
    else:
        feed = Feeder(network)

        def call(batch: Batch, number: int) -> Any:
            return feed(batch)

    return lambda batch, number: _checked(call(batch, number), batch, network)


def _checked(score: Any, batch: Batch, network: nn.Module) -> Tensor:
    form = batch.date.shape
    if (
        not isinstance(score, Tensor)
        or score.shape[: len(form)] != form
        or score.dim() > 1 + len(form)
    ):
        shape = list(score.shape) if isinstance(score, Tensor) else type(score).__name__
        wanted = "[G, N] or [G, N, Q]" if batch.is_day else "[B] or [B, Q]"
        raise ConfigError(
            f"{type(network).__name__} gave {shape} for a batch of {list(form)} samples; "
            f"expected scores {wanted}."
        )
    return score


@contextmanager
def evaluated(network: nn.Module, device: torch.device) -> Iterator[None]:
    """The network on the device and in evaluation mode; afterwards as before."""
    first = next(network.parameters(), None)
    home = torch.device("cpu") if first is None else first.device
    training = network.training
    network.to(device).eval()
    try:
        yield
    finally:
        network.to(home).train(training)
