"""Labels transformed within each training day."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qtorch.core.errors import ConfigError, check_name

OPTIONS = ("drop_extreme", "zscore")


class DayLabel:
    """Drop the extreme labels of each day, then standardize the others.

    `drop_extreme`: the fraction of a day's labels, half at each end, that become NaN (0.05: the
    2.5% highest and lowest). `zscore`: rescale the others to mean 0 and standard deviation 1.
    MASTER (Li et al., AAAI 2024) is trained this way. Validation and prediction see every label
    unchanged.
    """

    def __init__(self, drop_extreme: float = 0.0, zscore: bool = False) -> None:
        if not 0 <= drop_extreme < 1:
            raise ConfigError(
                f"drop_extreme is {drop_extreme}; expected a fraction of at least 0 and below 1."
            )
        self.drop_extreme, self.zscore = float(drop_extreme), zscore

    def __call__(self, label: Tensor, mask: Tensor | None) -> Tensor:
        """Transform `label [G, N, Q]` with `mask [G, N]`; missing or dropped labels are NaN."""
        if mask is not None:
            label = label.masked_fill(~mask[..., None], torch.nan)
        count = (label == label).sum(1, keepdim=True)  # NaN differs from itself
        if self.drop_extreme:
            # Ranks instead of quantiles: they drop an exact number, even with ties. NaN sorts last.
            rank = label.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
            cut = (count * (self.drop_extreme / 2)).long()
            is_extreme = (rank < cut) | (rank >= count - cut)
            label = label.masked_fill(is_extreme, torch.nan)
            count = torch.sub(count, cut, alpha=2)
        if self.zscore:  # a day without labels stays NaN: its count is zero
            deviation = label - label.nansum(1, keepdim=True) / count
            spread = (deviation.square().nansum(1, keepdim=True) / count).sqrt()
            label = deviation / spread.masked_fill(spread == 0, 1.0)
        return label


def build_day_label(spec: Any) -> DayLabel | None:
    """Build a DayLabel from None, a mapping of its arguments, or a DayLabel."""
    if spec is None or isinstance(spec, DayLabel):
        return spec
    if not isinstance(spec, Mapping):
        raise ConfigError(f"day_label is {spec!r:.80}; expected a mapping of {', '.join(OPTIONS)}.")
    for name in spec:
        check_name("option of day_label", name, OPTIONS)
    return DayLabel(**spec)
