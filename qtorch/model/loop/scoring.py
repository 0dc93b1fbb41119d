"""Score all samples of a segment, in order and without gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pandas as pd
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.func import functional_call

from qtorch.core.errors import ConfigError
from qtorch.data.dataset.batch import Batch
from qtorch.data.dataset.batches import BatchLoader
from qtorch.data.dataset.samples import Samples
from qtorch.metrics.loss import BaseLoss, Combined, FunctionLoss
from qtorch.model.base import SCORE
from qtorch.process.heartbeat import beat

MIN_GPU_BATCH_SIZE = 8192


def score_series(
    network: nn.Module,
    samples: Samples,
    *,
    device: torch.device,
    batch_size: int,
    readout: Callable[[Tensor], Tensor] | None = None,
) -> pd.Series:
    """Return a float32 Series "score", indexed by (datetime, instrument).

    If the network has several outputs, `readout` turns them into a score; the default is the first
    output. `network` is a network, or a LightningModule whose `predict_step(batch, batch_idx)`
    returns the scores `[B]` or `[B, Q]` of a Batch. Its device and mode are restored afterwards.
    """
    device_samples = samples.to(device)
    by_day = bool(getattr(network, "cross_section", False))
    loader = BatchLoader(
        device_samples,
        batch_size=batch_size,
        order="day_sequential" if by_day else "sequential",
        days_per_batch=days_of_size(device_samples, batch_size),
    )
    module = network if isinstance(network, pl.LightningModule) else None
    forward = ForwardAdapter(network)
    with torch.inference_mode(), evaluation_mode(network, device):
        buffer = ScoreBuffer(len(samples), device)
        for batch_idx, batch in enumerate(loader):
            beat("scoring")
            score = forward(batch) if module is None else module.predict_step(batch, batch_idx)
            _check_scores(score, batch, network)
            if score.dim() > batch.date.dim():
                score = score[..., 0] if readout is None else readout(score)
            buffer.append(score, batch)
        scores = buffer.fetch()
    return pd.Series(scores.numpy(), index=samples.index, name=SCORE)


class ScoreBuffer:
    """Scores of all samples in one tensor on the device, which is copied to the host once."""

    def __init__(self, num_samples: int, device: torch.device) -> None:
        # One place before the scores, from which samples count, and one after them for padding.
        self._storage = torch.empty(1 + num_samples + 1, device=device)
        self._count = 0

    def append(self, scores: Tensor, batch: Batch) -> None:
        """Write the scores of the next samples, in the order of the batch and without padding."""
        remaining = self._storage[self._count :]
        self._count += batch.num_samples
        scores = scores.flatten().to(remaining.dtype)
        if batch.mask is None:
            remaining[1 : 1 + len(scores)] = scores
            return
        is_sample = batch.mask.flatten()
        places = is_sample.cumsum(0).masked_fill_(~is_sample, len(remaining) - 1)
        remaining.index_copy_(0, places, scores)

    def fetch(self) -> Tensor:
        """Return the scores on the host."""
        assert self._count == len(self._storage) - 2, "every sample has a score"
        return self._storage[1:-1].cpu()


class ForwardAdapter:
    """Call a network's `forward` on a Batch.

    A network of single samples receives a day batch flattened. A cross-section network needs day
    batches and raises ConfigError for others. Scores have the shape of the batch: `[B]` or `[B,
    Q]`, for a day batch `[G, N]` or `[G, N, Q]`. A network that ends with `squeeze()` may return
    the score of a single sample without an axis.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.flat = getattr(network, "inputs", "window") == "flat"
        self.cross_section = bool(getattr(network, "cross_section", False))
        self.extras: tuple[str, ...] = tuple(getattr(network, "extras", ()))
        # Looked up once: a small training step is not much slower than a search among modules.
        self._first_parameter = next(network.parameters(), None)

    def __call__(self, batch: Batch, state: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the network's scores of a batch.

        With `state` (parameters and buffers by name), this is a pure function of (state, batch).
        """
        arguments, keywords = self.arguments(batch)
        if state is None:
            scores = self.network(*arguments, **keywords)
        else:
            scores = functional_call(self.network, dict(state), arguments, keywords)
        if not isinstance(scores, Tensor):
            raise ConfigError(
                f"{type(self.network).__name__} returned {type(scores).__name__}, not a Tensor."
            )
        if scores.dim() == 0 and batch.date.numel() == 1:
            return scores.reshape(batch.date.shape)
        if batch.is_day and not self.cross_section:
            return scores.reshape(*batch.date.shape, *scores.shape[1:])
        return scores

    def arguments(self, batch: Batch) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """Return the positional and keyword arguments of `forward` for a batch."""
        if self.cross_section and not batch.is_day:
            raise ConfigError(
                f"{type(self.network).__name__} scores whole days and needs day batches: set "
                "model.batch.order=day (in Python, batch={'order': 'day'})."
            )
        network_batch = batch if self.cross_section else batch.flatten()
        x = network_batch.x
        if self.flat:
            x = x.transpose(-1, -2).flatten(-2)
        if self._first_parameter is not None:
            x = x.to(self._first_parameter.dtype)
        keywords = {name: self._extra_tensor(network_batch, name) for name in self.extras}
        if not self.cross_section:
            return (x,), keywords
        mask = network_batch.mask
        assert mask is not None, "a day batch has a mask"
        return (x, mask), keywords

    def _extra_tensor(self, batch: Batch, name: str) -> Tensor:
        tensors = {**batch.extra, "instrument": batch.instrument, "date": batch.date}
        if name not in tensors:
            available = ", ".join(sorted(tensors.keys() - {"raw_label"}))
            raise ConfigError(
                f"{type(self.network).__name__} needs the extra tensor {name!r}, which the dataset "
                f"does not have (it has {available}). Add it: "
                f"dataset.extras.{name}={{_target_: ...}}, see qtorch.data.dataset.extras."
            )
        return tensors[name]


def get_readout(loss: Any) -> Callable[[Tensor], Tensor]:
    """Return the function from outputs `[..., Q]` to a score `[...]`.

    This is the loss's `readout`; for any other callable, the first output.
    """
    return loss.readout if isinstance(loss, BaseLoss) else lambda score: score[..., 0]


def evaluation_batch_size(batch: Mapping[str, Any], device: torch.device) -> int:
    """Return the batch size for validation and prediction.

    This is `eval_size` if it is set. Otherwise a CPU uses the training batch size, which suits its
    caches, and a GPU a larger one, which keeps it busy.
    """
    if batch["eval_size"] is not None:
        return int(batch["eval_size"])
    size = int(batch["size"])
    return size if device.type == "cpu" else max(MIN_GPU_BATCH_SIZE, size)


def days_of_size(samples: Samples, batch_size: int) -> int:
    """Return the number of whole days (at least one) that have about `batch_size` samples."""
    return max(1, batch_size * samples.num_days // max(1, len(samples)))


def evaluation_days(
    batch: Mapping[str, Any], loss: Any, samples: Samples, device: torch.device
) -> int:
    """Return the number of days of a validation batch.

    As many as `evaluation_batch_size` allows if `eval_size` is set or on a GPU. Otherwise it is
    `days_per_batch` as in training, also for a loss whose mean may depend on the bounds of batches:
    a combined one, and a user's own function.
    """
    days = int(batch["days_per_batch"])
    is_plain = not isinstance(loss, BaseLoss)
    may_depend_on_bounds = is_plain or isinstance(loss, Combined | FunctionLoss)
    if may_depend_on_bounds or (batch["eval_size"] is None and device.type == "cpu"):
        return days
    return max(days, days_of_size(samples, evaluation_batch_size(batch, device)))


@contextmanager
def evaluation_mode(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Context manager: the network on the device and in evaluation mode, restored afterwards."""
    first_parameter = next(network.parameters(), None)
    original_device = torch.device("cpu") if first_parameter is None else first_parameter.device
    was_training = network.training
    network.to(device).eval()
    try:
        yield
    finally:
        network.to(original_device).train(was_training)


def _check_scores(score: Any, batch: Batch, network: nn.Module) -> None:
    batch_shape = batch.date.shape
    if (
        not isinstance(score, Tensor)
        or score.shape[: len(batch_shape)] != batch_shape
        or score.dim() > 1 + len(batch_shape)
    ):
        shape = list(score.shape) if isinstance(score, Tensor) else type(score).__name__
        expected_shape = "[G, N] or [G, N, Q]" if batch.is_day else "[B] or [B, Q]"
        raise ConfigError(
            f"{type(network).__name__} returned {shape} for {list(batch_shape)} samples; "
            f"expected scores {expected_shape}."
        )
