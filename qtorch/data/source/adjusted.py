"""Adjusted closes: scale the prices by them, and warn of prices that are raw or mixed."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import pandas as pd

from qtorch.core.errors import DataError, unknown_name_message
from qtorch.core.tables import find_column
from qtorch.data.panel.column_names import ADJUSTED_CLOSE, usual_field
from qtorch.data.panel.panel import Panel

logger = logging.getLogger(__name__)

PRICES = ("open", "high", "low", "close", "vwap")
# A close may be outside low..high, or differ from the adjusted one, by rounding, and in a few
# damaged bars.
TOLERANCE = 1e-4
MIXED_SHARE = 0.05


def select_adjusted_close(
    fields: Mapping[str, str], adjust: str, columns: Sequence[str], kind: str
) -> dict[str, str]:
    """Return the columns by field, where the one that `adjust` names is the adjusted close.

    `kind` says what the columns are, for messages. Raises DataError if there is no such column, or
    no raw close beside it.
    """
    adjusted = find_column(columns, [adjust])
    if adjusted is None:
        raise DataError(unknown_name_message(f"{kind} for adjust", adjust, columns))
    if fields.get("close", adjusted) == adjusted or "factor" in fields:
        raise DataError(
            f"adjust={adjust!r} needs the raw close beside the adjusted one, and no field "
            f"factor; the fields are {dict(fields)}."
        )
    other_fields = {field: name for field, name in fields.items() if name != adjusted}
    return {**other_fields, ADJUSTED_CLOSE: adjusted}


def adjust_prices(bars: pd.DataFrame) -> pd.DataFrame:
    """Scale prices by adjusted close / close, the volume by its inverse, and add the scale."""
    bars = bars.copy()
    adjusted = bars.pop(ADJUSTED_CLOSE)
    factor = (adjusted / bars["close"]).where(bars["close"] != 0)
    for field in PRICES:
        if field in bars:
            bars[field] = bars[field] * factor
    bars["close"] = adjusted.where(factor.notna())
    if "volume" in bars:
        bars["volume"] = (bars["volume"] / factor).where(factor != 0)
    bars["factor"] = factor
    return bars


def warn_raw_prices(panel: Panel, names: Mapping[str, str], location: str) -> None:
    """Warn if the panel's prices are raw beside an adjusted close, or some are raw and some not.

    `names` are the columns by field, as the user wrote them. At most one warning is logged.
    """
    raw_prices = [
        names[field]
        for field in ("open", "high", "low")
        if field in names and usual_field(names[field]) == field
    ]
    close = names.get("close", "")
    if raw_prices and usual_field(close) == ADJUSTED_CLOSE:
        logger.warning(
            "%s: the close is the adjusted %r, but %s are raw; read the raw close, and scale "
            "all prices together with %s.",
            location,
            close,
            ", ".join(raw_prices),
            _adjust_option(close),
        )
    elif _has_raw_close(panel):
        adjusted = names.get(ADJUSTED_CLOSE, ADJUSTED_CLOSE)
        logger.warning(
            "%s: the prices are raw, so splits and dividends look like returns. Scale all prices "
            "by the adjusted close %r with %s.",
            location,
            adjusted,
            _adjust_option(adjusted),
        )
    elif (share := _share_outside(panel)) > MIXED_SHARE:
        logger.warning(
            "%s: the close is outside low..high in %.0f%% of the bars, as if it were adjusted and "
            "the other prices were not. Read the raw close too, and scale all prices together "
            "by the column of the adjusted close, e.g. with %s.",
            location,
            100 * share,
            _adjust_option("Adj Close"),
        )


def _adjust_option(column: str) -> str:
    return f'data.adjust="{column}" (in Python adjust={column!r} of TableSource or FrameSource)'


def _has_raw_close(panel: Panel) -> bool:
    """Whether the close differs from an adjusted close that is a field beside it."""
    if not {"close", ADJUSTED_CLOSE} <= set(panel.fields):
        return False
    close, adjusted = panel.column("close"), panel.column(ADJUSTED_CLOSE)
    # A missing price on either side compares as False.
    return bool(((close - adjusted).abs() > TOLERANCE * adjusted.abs()).any())


def _share_outside(panel: Panel) -> float:
    """Return the share of bars whose close is outside low..high."""
    if not {"low", "high", "close"} <= set(panel.fields):
        return 0.0
    low, high, close = (panel.column(name) for name in ("low", "high", "close"))
    is_bar = ~(low.isnan() | high.isnan() | close.isnan())
    is_outside = is_bar & ((close < low * (1 - TOLERANCE)) | (close > high * (1 + TOLERANCE)))
    return float(is_outside.sum()) / max(int(is_bar.sum()), 1)
