"""Trains IGMTF: as each epoch begins, its bank is written anew with the weights of the moment."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from qtorch.core.errors import ConfigError
from qtorch.data.sample_set import Samples
from qtorch.model.module import ScoreModule
from qtorch.model.scoring import evaluated
from qtorch.nn.igmtf import IGMTF

CHUNK = 8192  # samples at once, where nothing is learnt


class IGMTFModule(ScoreModule):
    """A ScoreModule that fills the network's bank of hidden states from the train segment.

    `num_bank_days`: at most so many days, evenly spread over the segment (None: all of them). The
    bank is part of the network's state and so of each checkpoint: `days x instruments x hidden`
    numbers.
    """

    undivided: ClassVar[str | None] = None  # every rank fills the same bank

    def __init__(self, *arguments: Any, num_bank_days: int | None = None, **named: Any) -> None:
        super().__init__(*arguments, **named)
        if num_bank_days is not None and num_bank_days < 1:
            raise ConfigError(f"num_bank_days is {num_bank_days}; the bank holds one at least.")
        self.num_bank_days = num_bank_days

    def bind(self, train: Samples, valid: Samples | None) -> None:
        network = self.trains(IGMTF)
        num = min(train.num_days, self.num_bank_days or train.num_days)
        self._days = torch.linspace(0, train.num_days - 1, num).round().long()
        self._train = train
        network.reserve(num, train.most_a_day)
        network.to(train.device)

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        at = 0
        with evaluated(self.network, self.device), self.acting(IGMTF) as network:
            for days in torch.split(self._days, max(1, CHUNK // self._train.most_a_day)):
                batch = self._train.day_batch(days)
                if self._train.store == "host":
                    batch = self._train.sent(batch)
                (x, mask), _ = self.feeder.arguments(batch)
                network.keep(at, x, mask)
                at += len(days)
