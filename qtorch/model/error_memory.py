"""Past errors of a network's predictors by day and instrument, known when their labels are."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from qtorch.core.errors import DataError
from qtorch.data.batches import Batch
from qtorch.data.extras import Gatherable
from qtorch.data.sample_set import Samples
from qtorch.model.scoring import evaluated
from qtorch.nn.lora import acting
from qtorch.nn.tra import TRA, minmax

log = logging.getLogger(__name__)

CHUNK = 8192  # samples at once, where nothing is learnt


class ErrorMemory(Gatherable):
    """The errors of a TRA's predictors for the days that its samples may ask for.

    `values [days + 1, N, K]` begin `label_horizon + lookback - 1` days before the first sample;
    zeros where an error is not known; the last row takes what is to be forgotten. What `gather`
    gives for date t are errors on dates up to t - label_horizon, whose labels are known at t.
    """

    def __init__(self, network: TRA, samples: Samples) -> None:
        self.calendar, self.instruments = samples.calendar, samples.instruments
        self.lookback, self.horizon = network.lookback, network.label_horizon
        reach = network.label_horizon + network.lookback - 1
        self.start, self.end = int(samples.date[0]) - reach, int(samples.date[-1]) + 1
        form = (self.end - self.start + 1, len(samples.instruments), network.num_states)
        self.values = torch.zeros(form, device=samples.device)

    @property
    def width(self) -> int:
        return self.values.shape[-1]

    def gather(self, date: Tensor, instrument: Tensor) -> Tensor:
        """`[..., lookback, K]` for int64 `[...]` each, oldest first."""
        back = torch.arange(1 - self.lookback, 1, device=date.device) - self.horizon
        return self.values[(date - self.start)[..., None] + back, instrument[..., None]]

    def to(self, device: torch.device) -> ErrorMemory:
        moved = object.__new__(ErrorMemory)
        moved.__dict__.update(self.__dict__, values=self.values.to(device))
        return moved

    def write(self, date: Tensor, instrument: Tensor, errors: Tensor, known: Tensor) -> None:
        """Keep `errors [B, K]` of the samples that are `known [B]`."""
        row = torch.where(known, date - self.start, self.end - self.start)
        self.values[row, instrument] = torch.where(known[:, None], errors, 0.0)

    @torch.no_grad()
    def learn(self, network: nn.Module, samples: Samples) -> None:
        """Write what the predictors of a TRA (or of a LoRA's) err by on samples of this calendar
        or another."""
        days = torch.as_tensor(self.calendar.get_indexer(samples.calendar))
        who = torch.as_tensor(self.instruments.get_indexer(samples.instruments))
        device = self.values.device
        days, who = days.masked_fill(days < 0, self.end).to(device), who.to(device)
        asked = days[samples.date.to(device)]
        asked = (asked >= self.start) & (asked < self.end)
        rows = torch.nonzero(asked)[:, 0].to(samples.index_device)
        with evaluated(network, device), acting(network) as tra:
            assert isinstance(tra, TRA), "asked where the training or the prediction begins"
            for part in torch.split(rows, CHUNK):
                batch = samples.batch(part)
                if samples.store == "host":
                    batch = samples.sent(batch)
                x = batch.x.to(tra.predictors.weight.dtype)
                errors, known = errors_of(tra.predicted(tra.model(x)), batch)
                instrument = who[batch.instrument]
                known = known & (instrument >= 0)
                self.write(days[batch.date], instrument.clamp(min=0), minmax(errors), known)


def errors_of(found: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Squared errors `[B, K]` of predictions `[B, K, Q]`, means over the labels that are there;
    and which samples `[B]` have one."""
    target = batch.y
    assert target is not None, "an error is made against a label"
    there = ~target.isnan()  # [B, Q]
    if batch.mask is not None:
        there = there & batch.mask[:, None]
    error = (found.float() - target.nan_to_num()[:, None]).square() * there[:, None]
    return error.sum(-1) / there.sum(-1).clamp(min=1)[:, None], there.any(-1)


def recalling(network: TRA, samples: Samples, find: Callable[[slice], Samples]) -> Samples:
    """The samples with an extra "errors": what the network errs by on those that `find` gives for
    a slice of dates, labels as they were learnt."""
    memory = ErrorMemory(network, samples)
    first, last = samples.calendar[max(memory.start, 0)], samples.calendar[memory.end - 1]
    try:
        past = find(slice(first, last))
    except DataError as error:
        past = None
        log.warning("TRA routes without past errors: %s", error)
    if past is not None and past.target is not None:
        memory.learn(network, past.to(samples.device))
    samples.extras = {**samples.extras, "errors": memory}
    return samples
