"""Labels treated by day inside the training step: what a loss learns from, never what is judged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qtorch.core.errors import ConfigError, unknown_name

OPTIONS = ("drop_extreme", "zscore")


class DayLabel:
    """Within each day: drop the extreme labels, then standardise what is left.

    `drop_extreme`: the share of a day's labels, half at each end, that become NaN (0.05: the
    2.5% highest and lowest). `zscore`: mean 0 and deviation 1 of the rest. MASTER (Li et al.,
    AAAI 2024) trains so. Validation and prediction see every label as it is.
    """

    def __init__(self, drop_extreme: float = 0.0, zscore: bool = False) -> None:
        if not 0 <= drop_extreme < 1:
            raise ConfigError(f"drop_extreme is {drop_extreme}; it is a share, from 0 to below 1.")
        self.drop_extreme, self.zscore = float(drop_extreme), zscore

    def __call__(self, label: Tensor, mask: Tensor | None) -> Tensor:
        """`label [G, N, Q]`, `mask [G, N]`; new labels, NaN where there is none."""
        if mask is not None:
            label = label.masked_fill(~mask[..., None], torch.nan)
        if self.drop_extreme:
            # Ranks, not quantiles: so many go, ties or not. NaN sorts last.
            rank = label.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
            count = (~label.isnan()).sum(1, keepdim=True)
            cut = (count * (self.drop_extreme / 2)).floor()
            label = label.masked_fill((rank < cut) | (rank >= count - cut), torch.nan)
        if self.zscore:
            known = ~label.isnan()
            count = known.sum(1, keepdim=True).clamp_min(1)
            mean = label.nansum(1, keepdim=True) / count
            moved = label - mean
            spread = (moved.square().nansum(1, keepdim=True) / count).sqrt()
            label = moved / torch.where(spread > 0, spread, 1.0)
        return label


def day_label(spec: Any) -> DayLabel | None:
    """What `spec` says: None, a mapping of DayLabel's arguments, or a DayLabel."""
    if spec is None or isinstance(spec, DayLabel):
        return spec
    if not isinstance(spec, Mapping):
        raise ConfigError(f"day_label is {spec!r:.80}; expected a mapping of {', '.join(OPTIONS)}.")
    for name in spec:
        if name not in OPTIONS:
            raise ConfigError(unknown_name("option of day_label", str(name), OPTIONS))
    return DayLabel(**spec)
