"""Training step of IGMTF: the memory bank is recomputed at the start of each epoch."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from qtorch.core.errors import ConfigError
from qtorch.data.dataset.samples import Samples
from qtorch.model.loop.module import ScoreModule
from qtorch.model.loop.scoring import evaluation_mode
from qtorch.nn.cross_section.igmtf import IGMTF

CHUNK_SIZE = 8192  # samples per forward pass without gradients


class IGMTFModule(ScoreModule):
    """A ScoreModule that fills the network's bank of hidden states from the train segment.

    `num_bank_days`: the maximum number of days in the bank, spread evenly over the segment (None:
    all days). The bank is part of the network's state, and so of each checkpoint: days x
    instruments x hidden size numbers.
    """

    single_device_reason: ClassVar[str | None] = None  # every rank computes the same bank

    def __init__(self, *args: Any, num_bank_days: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if num_bank_days is not None and num_bank_days < 1:
            raise ConfigError(f"num_bank_days is {num_bank_days}; expected at least 1.")
        self.num_bank_days = num_bank_days

    def bind(self, train: Samples, valid: Samples | None) -> None:
        network = self.require_network(IGMTF)
        num_days = min(train.num_days, self.num_bank_days or train.num_days)
        self._days = torch.linspace(0, train.num_days - 1, num_days).round().long()
        self._train = train
        network.reset_bank(num_days, train.max_samples_per_day)
        network.to(train.device)

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        position = 0
        days_per_chunk = max(1, CHUNK_SIZE // self._train.max_samples_per_day)
        with evaluation_mode(self.network, self.device), self.effective_network(IGMTF) as network:
            for days in torch.split(self._days, days_per_chunk):
                batch = self._train.send_to_device(self._train.day_batch(days))
                (x, mask), _ = self.forward_adapter.arguments(batch)
                network.write_bank(position, x, mask)
                position += len(days)
