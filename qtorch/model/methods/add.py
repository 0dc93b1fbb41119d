"""Training step of ADD: two adversaries remove market information from the features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from qtorch.core.errors import ConfigError, DataError
from qtorch.data.dataset.batch import Batch
from qtorch.data.dataset.samples import Samples
from qtorch.metrics.loss import mean_from_sums
from qtorch.model.loop.module import ScoreModule
from qtorch.nn.cross_section.add import ADD, NUM_MARKET_STATES

UNKNOWN = -100  # market state of a day without labels; cross-entropy's ignore_index


class ADDModule(ScoreModule):
    """A ScoreModule that trains an ADD together with its Disentangler.

    `train/loss` is the loss of the score, plus the loss of the adversary's score, plus the
    cross-entropies of the market state as predicted by its own encoder and by the other adversary,
    plus `mu` times the squared error of the reconstructed windows. The market state of a day is its
    third (low, middle, high) among the train segment's days, by the mean raw label of the day.
    `valid/loss` is that of the score only.

    The adversaries' gradient is multiplied by -alpha before it reaches the encoders; alpha grows
    from 0 to `gamma_clip` by the epoch: 2 / (1 + exp(-gamma epoch)) - 1. The Disentangler is not
    part of the fitted model; fine-tuning creates a new one.
    """

    market: Tensor

    single_device_reason: ClassVar[str | None] = (
        "its adversaries' losses are means over different samples of a batch"
    )

    def __init__(
        self,
        *args: Any,
        mu: float = 0.05,
        gamma: float = 0.1,
        gamma_clip: float = 0.4,
        dec_dropout: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if min(mu, gamma, gamma_clip) < 0:
            raise ConfigError(
                f"mu={mu}, gamma={gamma}, gamma_clip={gamma_clip}: none may be negative."
            )
        self.mu, self.gamma, self.gamma_clip = mu, gamma, gamma_clip
        self.dec_dropout = dec_dropout

    def bind(self, train: Samples, valid: Samples | None) -> None:
        self.disentangler = self.require_network(ADD).disentangler(self.dec_dropout)
        self.register_buffer("market", market_states(train), persistent=False)

    @property
    def alpha(self) -> float:
        """The factor of the adversaries' gradient in this epoch (without its sign)."""
        return min(self.gamma_clip, 2 / (1 + math.exp(-self.gamma * self.current_epoch)) - 1)

    def training_sums(self, batch: Batch) -> tuple[Tensor, Tensor | int]:
        batch = self.apply_day_label(batch)
        (x, mask), _ = self.forward_adapter.arguments(batch)
        with self.effective_network(ADD) as network:
            state = network.encode(x)
            score = network.score_state(state, mask)
        total, total_weight = self.loss_sums_from_scores(score, batch)
        outputs = self.disentangler(x, mask, state, self.alpha)
        adversary, weight = self.loss_sums_from_scores(outputs.adv_excess, batch)
        is_padding = ~mask
        market = self.market[batch.date].masked_fill(is_padding, UNKNOWN)
        # Padding has x 0, so zeros there have no error.
        reconstruction = outputs.reconstruction.float().masked_fill(is_padding[..., None, None], 0)
        error = F.mse_loss(reconstruction, x, reduction="sum")
        auxiliary_loss = (
            mean_from_sums(adversary, torch.as_tensor(weight))
            + market_loss((outputs.market, outputs.adv_market), market)
            + self.mu * mean_from_sums(error, mask.sum() * (x.shape[2] * x.shape[3]))
        )
        return total + total_weight * auxiliary_loss, total_weight


def market_states(train: Samples) -> Tensor:
    """Return the market state of each calendar row, `[D]` int64 on the samples' device.

    0, 1 and 2 are the lowest, middle and highest third of the days by the mean raw label (first
    column); UNKNOWN are days without labels.
    """
    if train.raw_label is None:
        raise DataError("ADD derives the market state from raw labels, but the samples have none.")
    # On the CPU, where the order of the sums is always the same.
    label, date = train.raw_label[:, 0].double().cpu(), train.date.cpu()
    has_label = ~label.isnan()
    zeros = label.new_zeros(len(train.calendar))
    total = zeros.index_add(0, date, label.nan_to_num())
    count = zeros.index_add(0, date, has_label.double())
    mean = total / count  # NaN for a day without labels
    quantiles = torch.arange(1, NUM_MARKET_STATES).to(mean) / NUM_MARKET_STATES
    state = torch.bucketize(mean, torch.nanquantile(mean, quantiles))
    return state.masked_fill(count == 0, UNKNOWN).to(train.date.device)


def market_loss(logits: Sequence[Tensor], market: Tensor) -> Tensor:
    """Return the sum of the mean cross-entropies of several `logits [G, N, 3]` over the known ones
    of `market [G, N]`, or zero."""
    total = F.cross_entropy(
        torch.cat([each.flatten(0, 1) for each in logits]).float(),
        market.flatten().repeat(len(logits)),
        ignore_index=UNKNOWN,
        reduction="sum",
    )
    return mean_from_sums(total, (market != UNKNOWN).sum())
