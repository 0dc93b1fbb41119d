"""Checks for NaN and infinite weights and scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from qtorch.core.errors import DataError, format_count

if TYPE_CHECKING:
    from torch import nn

HOW_TO_ALLOW = (
    "To go on anyway, set the model's allow_nonfinite to True (+model.allow_nonfinite=true; for "
    "the commands that load a finished run, allow_nonfinite=true)."
)


def check_weights(network: nn.Module) -> None:
    """Raise DataError if a parameter of a network is NaN or infinite. Buffers may hold any value.

    Waits for the device that holds the parameters.
    """
    counts = {n: int((~p.detach().isfinite()).sum()) for n, p in network.named_parameters()}
    first = next((name for name, count in counts.items() if count), None)
    if first is not None:
        total = format_count(sum(p.numel() for p in network.parameters()), "weight")
        raise DataError(
            f"{sum(counts.values()):,} of {total} of the {type(network).__name__} are NaN or "
            f"infinite, the first in {first!r}. Train again with a lower learning rate or with "
            f"gradient_clip_val, and check the data for very large values. {HOW_TO_ALLOW}"
        )


def check_scores(scores: pd.Series) -> None:
    """Raise DataError if a score is NaN or infinite."""
    description = describe_nonfinite(scores)
    if description is not None:
        raise DataError(
            f"{description}. The weights are finite: check the features of these days for NaN (add "
            f"Fillna to the processors) and for very large values. {HOW_TO_ALLOW}"
        )


def describe_nonfinite(scores: pd.Series | pd.DataFrame) -> str | None:
    """Say how many scores, by (datetime, instrument), are NaN or infinite; None if none is."""
    is_bad = ~np.isfinite(np.asarray(scores, dtype=np.float64))
    if not is_bad.any():
        return None
    days = scores.index.get_level_values("datetime")
    bad_days = days[np.flatnonzero(is_bad.reshape(len(days), -1).any(axis=1))].unique()
    return (
        f"{int(is_bad.sum()):,} of {format_count(is_bad.size, 'score')} are NaN or "
        f"infinite, on {len(bad_days):,} of {format_count(days.nunique(), 'day')}, the first of "
        f"which is {bad_days.min():%Y-%m-%d}"
    )
