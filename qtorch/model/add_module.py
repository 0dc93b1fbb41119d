"""Trains ADD: scores are learnt while two adversaries keep the market out of what they see."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from qtorch.core.errors import ConfigError, DataError
from qtorch.data.batches import Batch
from qtorch.data.sample_set import Samples
from qtorch.metrics.loss import mean_of
from qtorch.model.module import ScoreModule
from qtorch.nn.add import ADD, MARKETS

UNKNOWN = -100  # the state of the market on a day without labels; cross-entropy's "ignore"


class ADDModule(ScoreModule):
    """A ScoreModule that teaches an ADD with its Disentangler.

    `train/loss` is the loss of the score, plus that of the adversary's score, plus the
    cross-entropies of the market's state by its own encoder and by the other adversary, plus
    `mu` times the squared error of the windows that are made again. The market's state is the
    third of the train segment's days, by the mean of the day's raw labels, that a day is in.
    `valid/loss` is of the score alone.

    The adversaries' gradient reaches the encoders times -alpha, which grows by the epoch from 0
    to `gamma_clip`: 2 / (1 + exp(-gamma epoch)) - 1. The Disentangler is not part of the fitted
    model; a fine-tuning begins with a new one.
    """

    market: Tensor

    undivided: ClassVar[str | None] = (
        "its adversaries' losses are means over a batch, each of other samples"
    )

    def __init__(
        self,
        *arguments: Any,
        mu: float = 0.05,
        gamma: float = 0.1,
        gamma_clip: float = 0.4,
        dec_dropout: float = 0.0,
        **named: Any,
    ) -> None:
        super().__init__(*arguments, **named)
        if min(mu, gamma, gamma_clip) < 0:
            raise ConfigError(f"mu {mu}, gamma {gamma}, gamma_clip {gamma_clip}: none below 0.")
        self.mu, self.gamma, self.gamma_clip = mu, gamma, gamma_clip
        self.dec_dropout = dec_dropout

    def bind(self, train: Samples, valid: Samples | None) -> None:
        self.disentangler = self.trains(ADD).disentangler(self.dec_dropout)
        self.register_buffer("market", market_states(train), persistent=False)

    @property
    def alpha(self) -> float:
        """What the adversaries' gradient is multiplied by in this epoch, but for its sign."""
        grown = 2 / (1 + math.exp(-self.gamma * self.current_epoch)) - 1
        return min(self.gamma_clip, grown)

    def training_sums(self, batch: Batch) -> tuple[Tensor, Tensor | int]:
        batch = self.to_learn(batch)
        (x, mask), _ = self.feeder.arguments(batch)
        with self.acting(ADD) as network:
            state = network.encode(x)
            score = network.read(state, mask)
        total, share = self.sums_of(score, batch)
        found = self.disentangler(x, mask, state, self.alpha)
        adversary, weight = self.sums_of(found.adv_excess, batch)
        market = self.market[batch.date].masked_fill(~mask, UNKNOWN)
        there = mask[..., None, None].to(x.dtype)
        error = ((found.rebuilt.float() - x).square() * there).sum()
        beside = (
            mean_of(adversary, torch.as_tensor(weight))
            + market_loss(found.market, market)
            + market_loss(found.adv_market, market)
            + self.mu * mean_of(error, there.sum() * x.shape[2] * x.shape[3])
        )
        return total + share * beside, share


def market_states(train: Samples) -> Tensor:
    """`[D]` int64 on the samples' device, by calendar row: 0, 1 or 2 for the lowest, the middle
    or the highest third of the days by the mean raw label (the first column); else UNKNOWN."""
    if train.raw_label is None:
        raise DataError("ADD learns the market's state from raw labels; these samples have none.")
    label = train.raw_label[:, 0].double()
    known = ~label.isnan()
    total, count = (
        torch.zeros(len(train.calendar), dtype=torch.float64, device=label.device).index_add_(
            0, train.date, values
        )
        for values in (label.nan_to_num(), known.double())
    )
    mean = total / count  # NaN for a day without labels
    edges = torch.arange(1, MARKETS, device=mean.device, dtype=mean.dtype) / MARKETS
    state = torch.bucketize(mean, torch.nanquantile(mean, edges))
    return state.masked_fill(count == 0, UNKNOWN)


def market_loss(logits: Tensor, market: Tensor) -> Tensor:
    """Mean cross-entropy of `logits [G, N, 3]` where `market [G, N]` is known; zero if nowhere."""
    lost = F.cross_entropy(
        logits.flatten(0, 1).float(), market.flatten(), ignore_index=UNKNOWN, reduction="sum"
    )
    return mean_of(lost, (market != UNKNOWN).sum())
