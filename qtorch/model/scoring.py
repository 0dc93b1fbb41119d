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
from qtorch.model.module import as_columns, network_input

SCORE = "score"
GPU_BATCH = 8192


def evaluation_size(batch: Mapping[str, Any], device: torch.device) -> int:
    """Samples a batch where nothing is learnt: as given, else what suits the device. A CPU's
    caches like a training batch, a GPU is kept busy by a larger one."""
    if batch["eval_size"] is not None:
        return int(batch["eval_size"])
    return int(batch["size"]) if device.type == "cpu" else max(GPU_BATCH, int(batch["size"]))


def score_series(
    network: nn.Module, samples: Samples, *, device: torch.device, batch_size: int
) -> pd.Series:
    """A float32 Series "score" by (datetime, instrument); the first output where there are more.

    `network` is a network, or a LightningModule whose `predict_step(batch, batch_idx)` gives the
    scores `[B]` or `[B, Q]` of a Batch. It is left on the device and in the mode where it was.
    """
    moved = samples.to(device)
    loader = BatchLoader(moved, batch_size=batch_size, order="sequential")
    with torch.inference_mode(), evaluated(network, device):
        call = batch_scorer(network)
        parts = []
        for number, batch in enumerate(loader):
            beat("scoring")
            parts.append(call(batch, number))
        scores = torch.cat(parts).float().cpu().numpy() if parts else torch.zeros(0).numpy()
    return pd.Series(scores, index=samples.index, name=SCORE)


def batch_scorer(network: nn.Module) -> Callable[[Batch, int], Tensor]:
    """`(batch, number) -> scores [B]` of a network or of a LightningModule."""
    if isinstance(network, pl.LightningModule):
        step: Any = network.predict_step
        return lambda batch, number: _first(step(batch, number), batch, network)
    inputs = getattr(network, "inputs", "window")
    return lambda batch, number: _first(network(network_input(batch.x, inputs)), batch, network)


def _first(score: Any, batch: Batch, network: nn.Module) -> Tensor:
    if not isinstance(score, Tensor) or score.dim() not in (1, 2) or len(score) != len(batch.x):
        shape = list(score.shape) if isinstance(score, Tensor) else type(score).__name__
        raise ConfigError(
            f"{type(network).__name__} gave {shape} for a batch of {len(batch.x)} samples; "
            "expected scores [B] or [B, Q]."
        )
    return as_columns(score)[:, 0]


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
