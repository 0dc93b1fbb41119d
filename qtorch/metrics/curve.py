"""Cumulative return and drawdown of a series of returns."""

from __future__ import annotations

from typing import Literal, TypeAlias

import pandas as pd

from qtorch.core.errors import ConfigError, unknown_name

Mode: TypeAlias = Literal["sum", "product"]
MODES = ("sum", "product")


def cumulative_return(r: pd.Series, mode: Mode = "sum") -> pd.Series:
    """Cumulative return of returns per period (fractions): summed, or compounded ("product")."""
    return r.cumsum() if _validate_mode(mode) == "sum" else (1 + r).cumprod() - 1


def drawdown(r: pd.Series, mode: Mode = "sum") -> pd.Series:
    """Drawdown of the cumulative return from its running maximum: zero or negative.

    A fraction of the initial capital ("sum") or of the running maximum ("product"). As in Qlib's
    `risk_analysis` the curve starts at the first return, so a loss on the first day is not a
    drawdown.
    """
    total = cumulative_return(r, mode)
    if mode == "sum":
        return total - total.cummax()
    return (1 + total) / (1 + total).cummax() - 1


def _validate_mode(mode: str) -> str:
    if mode not in MODES:
        raise ConfigError(unknown_name("mode of returns", mode, MODES))
    return mode
