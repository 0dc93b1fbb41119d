"""Past errors of TRA's predictors by day and instrument, available once their labels are known."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from qtorch.core.errors import DataError
from qtorch.data.batches import Batch
from qtorch.data.extras import Gatherable
from qtorch.data.sample_set import Samples
from qtorch.model.scoring import evaluation_mode
from qtorch.nn.lora import use_effective_weights
from qtorch.nn.tra import TRA, minmax

log = logging.getLogger(__name__)

CHUNK_SIZE = 8192  # samples per forward pass without gradients


class ErrorMemory(Gatherable):
    """The errors of a TRA's predictors on the days that its samples may look up.

    `values [days + 1, N, K]` start `label_horizon + lookback - 1` days before the first sample.
    They are zero where an error is not known; the last row receives writes that are discarded. For
    date t, `gather` returns errors of dates up to t - label_horizon, whose labels are known at t.
    """

    def __init__(self, network: TRA, samples: Samples) -> None:
        self.calendar, self.instruments = samples.calendar, samples.instruments
        self.lookback, self.horizon = network.lookback, network.label_horizon
        history_days = network.label_horizon + network.lookback - 1
        self.start, self.end = int(samples.date[0]) - history_days, int(samples.date[-1]) + 1
        shape = (self.end - self.start + 1, len(samples.instruments), network.num_states)
        self.values = torch.zeros(shape, device=samples.device)

    @property
    def width(self) -> int:
        return self.values.shape[-1]

    def gather(self, date: Tensor, instrument: Tensor) -> Tensor:
        """Return `[..., lookback, K]`, oldest first, for int64 dates and instruments `[...]`."""
        offsets = torch.arange(1 - self.lookback, 1, device=date.device) - self.horizon
        return self.values[(date - self.start)[..., None] + offsets, instrument[..., None]]

    def to(self, device: torch.device) -> ErrorMemory:
        memory = object.__new__(ErrorMemory)
        memory.__dict__.update(self.__dict__, values=self.values.to(device))
        return memory

    def write(self, date: Tensor, instrument: Tensor, errors: Tensor, has_label: Tensor) -> None:
        """Store `errors [B, K]` of the samples that have a label, `has_label [B]`."""
        row = torch.where(has_label, date - self.start, self.end - self.start)
        self.values[row, instrument] = torch.where(has_label[:, None], errors, 0.0)

    @torch.no_grad()
    def record_errors(self, network: nn.Module, samples: Samples) -> None:
        """Store the errors of a TRA, or of a LoRA of one, on samples.

        The samples may have another calendar and other instruments.
        """
        days = torch.as_tensor(self.calendar.get_indexer(samples.calendar))
        columns = torch.as_tensor(self.instruments.get_indexer(samples.instruments))
        device = self.values.device
        days, columns = days.masked_fill(days < 0, self.end).to(device), columns.to(device)
        is_covered = days[samples.date.to(device)]
        is_covered = (is_covered >= self.start) & (is_covered < self.end)
        rows = torch.nonzero(is_covered)[:, 0].to(samples.index_device)
        with evaluation_mode(network, device), use_effective_weights(network) as effective_tra:
            assert isinstance(effective_tra, TRA), "fit and predict have checked the network"
            for chunk in torch.split(rows, CHUNK_SIZE):
                batch = samples.batch(chunk)
                if samples.store == "host":
                    batch = samples.send_to_device(batch)
                x = batch.x.to(effective_tra.predictors.weight.dtype)
                errors, has_label = prediction_errors(
                    effective_tra.predictions(effective_tra.model(x)), batch
                )
                instrument = columns[batch.instrument]
                has_label = has_label & (instrument >= 0)
                self.write(days[batch.date], instrument.clamp(min=0), minmax(errors), has_label)


def prediction_errors(predictions: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return squared errors `[B, K]` and which samples have a label, `[B]`.

    `predictions` is `[B, K, Q]`. The errors are means over the labels that are not NaN.
    """
    target = batch.y
    assert target is not None, "errors need labels"
    has_label = ~target.isnan()  # [B, Q]
    if batch.mask is not None:
        has_label = has_label & batch.mask[:, None]
    error = (predictions.float() - target.nan_to_num()[:, None]).square() * has_label[:, None]
    return error.sum(-1) / has_label.sum(-1).clamp(min=1)[:, None], has_label.any(-1)


def with_error_memory(
    network: TRA, samples: Samples, load_samples: Callable[[slice], Samples]
) -> Samples:
    """Add an extra "errors" to the samples: the past errors of the network.

    `find` returns the labelled samples of a slice of dates, with labels as in training.
    """
    memory = ErrorMemory(network, samples)
    first, last = samples.calendar[max(memory.start, 0)], samples.calendar[memory.end - 1]
    try:
        past = load_samples(slice(first, last))
    except DataError as error:
        past = None
        log.warning("TRA predicts without past errors: %s", error)
    if past is not None and past.target is not None:
        memory.record_errors(network, past.to(samples.device))
    samples.extras = {**samples.extras, "errors": memory}
    return samples
