"""The exchange: which prices are dealt at, what stops a trade, and what it costs."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import pandas as pd

from qtorch.backtest.quotes import CUMULATIVE, CURRENT, Bools, Floats, Quotes, VolumeLimit
from qtorch.core.configured import Configured
from qtorch.core.errors import ConfigError, DataError, unknown_name
from qtorch.core.session import session
from qtorch.core.trust import trusted_type
from qtorch.data.provider import build_source, default_source
from qtorch.data.source.base import Instruments, Source, frequency

log = logging.getLogger(__name__)

Region: TypeAlias = Literal["region"]
Limit: TypeAlias = tuple[str, str] | Sequence[str] | float | Literal["none"] | None

# Trade unit and price limit by region, as Qlib's (qlib/config.py).
TRADE_UNITS = {"us": 1, "cn": 100}
LIMITS = {"us": None, "cn": 0.095}
ZERO_PRICE = 1e-8
_CHANGE = "$close/Ref($close, 1)-1"


@trusted_type
class Exchange(Configured):
    """Prices, limits, units and costs of a market; answers to Qlib's `Exchange`.

    `deal_price`: a field or an expression ("close", "$open", "Ref($open, -1)"), or two, for
    buying and for selling; the close where it is missing. `limit_threshold`: a fraction: not
    bought where the day's `change` is at or above it, not sold at or below its negative; or two
    expressions that are non-zero where buying, and where selling, is not possible; "none": no
    limits; None: the region's. `trade_unit`: shares of a lot, rounded to by way of `factor`
    (amounts are in adjusted shares); None: no rounding; "region": the region's (us 1, cn 100).
    Costs are fractions of a trade's value, `min_cost` is an amount of money a trade;
    `impact_cost` adds its product with the square of the trade's share of the day's value.
    `volume_threshold`: `("current" | "cum", expression)`, or a mapping of "all", "buy", "sell" to
    such pairs: the most that may be dealt in one bar, in adjusted shares; "cum" is less what was
    dealt that day. `extra_quote`: a frame by (instrument, datetime) of further instruments, with
    the column $close and, where they differ, the other prices, $volume, $factor, limit_buy,
    limit_sell. `subscribe_fields`: fields or expressions that a strategy reads by `Market.field`.
    `codes`: the universe or list whose members trade; others count as suspended.

    An instrument without a close is suspended. Differences from Qlib: `change` is computed where
    the source has no such field, where Qlib lets every limit pass; the deal price may be any
    expression; `limit_threshold` may be switched off in every region; negative costs are refused.
    """

    def __init__(
        self,
        freq: str = "day",
        start_time: Any = None,
        end_time: Any = None,
        codes: Instruments = "all",
        deal_price: str | Sequence[str] | None = None,
        subscribe_fields: Sequence[str] = (),
        limit_threshold: Limit = None,
        volume_threshold: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
        open_cost: float = 0.0015,
        close_cost: float = 0.0025,
        min_cost: float = 5.0,
        impact_cost: float = 0.0,
        extra_quote: pd.DataFrame | None = None,
        trade_unit: float | Region | None = "region",
        source: Any = None,
    ) -> None:
        self.freq = frequency(freq)
        self.start_time, self.end_time = start_time, end_time
        self.codes = codes
        self.buy_field, self.sell_field = _deal_prices(deal_price)
        self.subscribe_fields = tuple(subscribe_fields)
        self.limit_threshold = _limit(limit_threshold)
        self.volume_threshold = _volume_threshold(volume_threshold)
        for name in ("open_cost", "close_cost", "min_cost", "impact_cost"):
            _check_cost(name, locals()[name])
        self.open_cost, self.close_cost = float(open_cost), float(close_cost)
        self.min_cost, self.impact_cost = float(min_cost), float(impact_cost)
        self.extra_quote = extra_quote
        self.trade_unit = _trade_unit(trade_unit)
        self._source = source
        self._quotes: dict[tuple[Any, Any], Quotes] = {}

    @property
    def source(self) -> Source:
        """Where the bars come from: the given source, else that of `qtorch.init`."""
        if not isinstance(self._source, Source):
            given = self._source
            self._source = default_source() if given is None else build_source(given)
        return self._source

    def calendar(self) -> pd.DatetimeIndex:
        """Every bar of the source, ascending."""
        return self.source.read_calendar(self.freq)

    def quotes(self, start: pd.Timestamp, end: pd.Timestamp) -> Quotes:
        """The bars between two dates (inclusive) and the one before; read once."""
        if (start, end) not in self._quotes:
            self._quotes[start, end] = self._read(start, end)
        return self._quotes[start, end]

    def _read(self, start: pd.Timestamp, end: pd.Timestamp) -> Quotes:
        calendar = self.calendar()
        row = int(calendar.searchsorted(start))
        begin = calendar[max(0, row - 1)]
        names = self._fields()
        panel = self.source.feature_panel(
            self.codes, list(dict.fromkeys(names.values())), begin, end, self.freq
        )
        outside = ~panel.mask.cpu().numpy()

        def read(what: str) -> Floats:
            values = panel.column(names[what]).cpu().numpy().astype(np.float64)
            values[outside] = np.nan
            return values

        close = read("close")
        limit_buy, limit_sell = self._limits(close, read)
        factor = read("factor") if "factor" in names else None
        limits = {
            k: VolumeLimit(read(f"volume {k}"), v[0] == CUMULATIVE)
            for k, v in self.volume_threshold.items()
        }
        quotes = Quotes(
            panel.calendar,
            min(1, row),
            panel.instruments,
            close=close,
            buy_price=self._deal_price(read("buy"), close, "buy"),
            sell_price=self._deal_price(read("sell"), close, "sell"),
            volume=read("volume") if "volume" in names else np.full_like(close, np.nan),
            factor=self._usable(factor, close),
            limit_buy=limit_buy,
            limit_sell=limit_sell,
            buy_volume=tuple(limits[k] for k in limits if k != "sell"),
            sell_volume=tuple(limits[k] for k in limits if k != "buy"),
            fields={name: read(f"field {name}") for name in self.subscribe_fields},
        )
        return quotes if self.extra_quote is None else self._with_extra(quotes)

    def _fields(self) -> dict[str, str]:
        """What is read, by what it is for."""
        known = self.source.fields(self.freq)
        names = {"close": "$close", "buy": self.buy_field, "sell": self.sell_field}
        names |= {name: f"${name}" for name in ("volume", "factor") if name in known}
        if isinstance(self.limit_threshold, float):
            names["change"] = "$change" if "change" in known else _CHANGE
        elif self.limit_threshold is not None:
            names["no buying"], names["no selling"] = self.limit_threshold
        names |= {f"field {name}": _expression(name) for name in self.subscribe_fields}
        return names | {f"volume {k}": v[1] for k, v in self.volume_threshold.items()}

    def _limits(self, close: Floats, read: Any) -> tuple[Bools, Bools]:
        suspended = np.isnan(close)
        if self.limit_threshold is None:
            return suspended, suspended
        if isinstance(self.limit_threshold, float):
            change = read("change")
            up, down = change >= self.limit_threshold, change <= -self.limit_threshold
            return up | suspended, down | suspended
        # NaN counts as limited, as in Qlib.
        return (read("no buying") != 0) | suspended, (read("no selling") != 0) | suspended

    def _deal_price(self, price: Floats, close: Floats, side: str) -> Floats:
        missing = ~(price > ZERO_PRICE) & ~np.isnan(close)
        if missing.any():
            log.warning(
                "%d of %d prices to %s at (%s) are missing or zero; the close is taken there.",
                missing.sum(),
                (~np.isnan(close)).sum(),
                side,
                self.buy_field if side == "buy" else self.sell_field,
            )
        return np.where(missing, close, price)

    def _usable(self, factor: Floats | None, close: Floats) -> Floats | None:
        """The factor, where amounts are rounded by it; None where they are not."""
        if self.trade_unit is None:
            return None
        if factor is None or (np.isnan(factor) & ~np.isnan(close)).any():
            log.warning(
                "the field factor is missing%s: amounts are not rounded to the trade unit of %g.",
                "" if factor is None else " on some days",
                self.trade_unit,
            )
            return None
        return factor

    def _with_extra(self, quotes: Quotes) -> Quotes:
        frame = self.extra_quote
        assert frame is not None
        if "$close" not in frame:
            raise ConfigError(f"extra_quote needs the column $close; it has {list(frame.columns)}.")
        if "instrument" in frame.index.names and frame.index.names[0] != "instrument":
            frame = frame.swaplevel()
        names = pd.Index(sorted(set(frame.index.get_level_values(0).astype("str"))), dtype="str")
        doubled = names.intersection(quotes.instruments)
        if len(doubled):
            raise ConfigError(f"extra_quote holds {list(doubled[:5])}, which the source has too.")
        wide = quotes.widened(names)
        at = wide.instruments.get_indexer(names)

        def column(name: str, default: Any) -> Any:
            if name not in frame:
                return default
            table = frame[name].unstack(0)
            table.columns = table.columns.astype("str")
            return table.reindex(index=wide.dates, columns=names).to_numpy()

        close = column("$close", None).astype(np.float64)
        wide.close[:, at] = close
        wide.buy_price[:, at] = column(self.buy_field, close)
        wide.sell_price[:, at] = column(self.sell_field, close)
        wide.volume[:, at] = column("$volume", np.nan)
        if wide.factor is not None:
            wide.factor[:, at] = column("$factor", 1.0)
        for name, array in (("limit_buy", wide.limit_buy), ("limit_sell", wide.limit_sell)):
            limited = column(name, False)
            array[:, at] = np.isnan(close) | (pd.isna(limited) | np.equal(limited, True))
        return wide


def _deal_prices(given: str | Sequence[str] | None) -> tuple[str, str]:
    both = ("close",) * 2 if given is None else (given,) * 2 if isinstance(given, str) else given
    if len(both) != 2 or not all(isinstance(p, str) and p for p in both):
        raise ConfigError(
            f"deal_price={given!r}: expected a field or an expression, or two of them "
            "(for buying, for selling)."
        )
    buy, sell = map(_expression, both)
    return buy, sell


def _expression(given: str) -> str:
    """A field's name as an expression; an expression as it is."""
    return f"${given}" if re.fullmatch(r"[A-Za-z_]\w*", given) else given


def _limit(given: Limit) -> tuple[str, str] | float | None:
    if given is None:
        return LIMITS[session().region]
    if isinstance(given, str):
        if given == "none":
            return None
    elif isinstance(given, int | float) and not isinstance(given, bool):
        if 0 < given < math.inf:
            return float(given)
    elif isinstance(given, Sequence) and len(given) == 2:
        return str(given[0]), str(given[1])
    raise ConfigError(
        f"limit_threshold={given!r}: expected a fraction above zero such as 0.095, two "
        "expressions (no buying, no selling), 'none', or null for the region's."
    )


def _volume_threshold(given: Any) -> dict[str, tuple[str, str]]:
    if given is None:
        return {}
    limits = given if isinstance(given, Mapping) else {"all": given}
    for side, limit in limits.items():
        if side not in ("all", "buy", "sell"):
            raise ConfigError(
                unknown_name("side of volume_threshold", side, ("all", "buy", "sell"))
            )
        if isinstance(limit, str) or len(limit) != 2 or limit[0] not in (CUMULATIVE, CURRENT):
            raise ConfigError(
                f"volume_threshold: {side}={limit!r}; expected a pair of 'cum' or 'current' and "
                "an expression, such as ('cum', '0.1 * $volume')."
            )
    return {side: (str(limit[0]), str(limit[1])) for side, limit in limits.items()}


def _trade_unit(given: float | str | None) -> float | None:
    unit = TRADE_UNITS[session().region] if given == "region" else given
    if unit is None or (isinstance(unit, int | float) and unit > 0):
        return unit
    raise ConfigError(f"trade_unit={given!r}: expected shares of a lot, null, or 'region'.")


def _check_cost(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ConfigError(
            f"{name}={value!r}: a cost is zero or more "
            f"({'an amount of money' if name == 'min_cost' else 'a fraction of the value'})."
        )
    if name in ("open_cost", "close_cost") and value >= 1:
        raise DataError(f"{name}={value!r} is a fraction of the trade's value; 0.0005 is 5 bp.")
