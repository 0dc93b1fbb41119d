"""Returns as a curve, and how far it lies below its highest point so far."""

from __future__ import annotations

from typing import Literal, TypeAlias

import pandas as pd

from qtorch.core.errors import ConfigError, unknown_name

Mode: TypeAlias = Literal["sum", "product"]
MODES = ("sum", "product")


def cumulative_return(r: pd.Series, mode: Mode = "sum") -> pd.Series:
    """Returns per period (fractions) added up ("sum") or compounded, less 1 ("product")."""
    return r.cumsum() if _checked(mode) == "sum" else (1 + r).cumprod() - 1


def drawdown(r: pd.Series, mode: Mode = "sum") -> pd.Series:
    """How far the curve lies under its highest value so far: 0 or less.

    In fractions of the start ("sum") or of the highest value ("product"). As in Qlib's
    `risk_analysis` the curve begins with the first return: a loss on the first day is none.
    """
    total = cumulative_return(r, mode)
    if mode == "sum":
        return total - total.cummax()
    return (1 + total) / (1 + total).cummax() - 1


def _checked(mode: str) -> str:
    if mode not in MODES:
        raise ConfigError(unknown_name("mode of returns", mode, MODES))
    return mode
