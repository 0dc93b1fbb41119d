"""The exchange: deal prices, trading restrictions and transaction costs."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from qtorch.core.configured import Configured
from qtorch.core.dates import as_stamp, bar_text, frequency, last_instant
from qtorch.core.errors import ConfigError, check_name
from qtorch.core.session import get_region
from qtorch.core.trust import trust_subclasses
from qtorch.data.source.base import Instruments, Source
from qtorch.data.source.frame import build_source, default_source

Floats: TypeAlias = NDArray[np.float64]
Bools: TypeAlias = NDArray[np.bool_]
Indices: TypeAlias = NDArray[np.intp]
Region: TypeAlias = Literal["region"]
Limit: TypeAlias = tuple[str, str] | Sequence[str] | float | Literal["none"] | None

log = logging.getLogger(__name__)

CUMULATIVE, CURRENT = "cum", "current"
ZERO_PRICE = 1e-8
_CHANGE = "$close/Ref($close, 1)-1"


@dataclass(frozen=True)
class VolumeLimit:
    """The maximum amount that can be traded: `amount [D, N]`; NaN means nothing can be traded.

    `cumulative`: amounts traded earlier on the same day count towards the limit.
    """

    amount: Floats
    cumulative: bool


@dataclass(frozen=True)
class Quotes:
    """Bars of all instruments on the dates of a backtest, plus the bar before them if there is one.

    `first` is the row of the first trading bar: 1, or 0 if there is no earlier bar. All arrays are
    `[D, N]`, float64 or bool. `close` is NaN when an instrument does not trade. `buy_price` and
    `sell_price` fall back to the close. `limit_buy` and `limit_sell` are True when an instrument
    cannot be bought or sold. `factor` is None when amounts are not rounded to trade units.
    `fields` are the exchange's `subscribe_fields`.
    """

    dates: pd.DatetimeIndex
    first: int
    instruments: pd.Index
    close: Floats
    buy_price: Floats
    sell_price: Floats
    volume: Floats
    factor: Floats | None
    limit_buy: Bools
    limit_sell: Bools
    buy_volume: tuple[VolumeLimit, ...] = ()
    sell_volume: tuple[VolumeLimit, ...] = ()
    fields: Mapping[str, Floats] = field(default_factory=dict)

    @property
    def is_suspended(self) -> Bools:
        """`[D, N]`: whether an instrument has no close, so that it cannot be traded."""
        return np.isnan(self.close)

    def add_instruments(self, instruments: pd.Index) -> Quotes:
        """Add instruments without any bars (always suspended); the result is in sorted order."""
        names = self.instruments.union(instruments)
        column = self.instruments.get_indexer(names)
        exists = column >= 0

        def widen(array: Any, fill: float = np.nan) -> Any:
            return np.where(exists, array[:, column], fill)

        def widen_limits(limits: tuple[VolumeLimit, ...]) -> tuple[VolumeLimit, ...]:
            return tuple(VolumeLimit(widen(limit.amount), limit.cumulative) for limit in limits)

        return Quotes(
            self.dates,
            self.first,
            names,
            close=widen(self.close),
            buy_price=widen(self.buy_price),
            sell_price=widen(self.sell_price),
            volume=widen(self.volume),
            factor=None if self.factor is None else widen(self.factor),
            limit_buy=widen(self.limit_buy, True),
            limit_sell=widen(self.limit_sell, True),
            buy_volume=widen_limits(self.buy_volume),
            sell_volume=widen_limits(self.sell_volume),
            fields={name: widen(values) for name, values in self.fields.items()},
        )


@trust_subclasses
class Exchange(Configured):
    """Deal prices, price limits, trade units and costs of a market; corresponds to Qlib's Exchange.

    `deal_price`: a field or an expression ("close", "$open", "Ref($open, -1)"), or a pair of them,
    for buying and for selling; a missing price is replaced by the close. `limit_threshold`: a
    fraction (no buying if the day's `change` is at or above it, no selling if `change` is at or
    below its negative), or two expressions that are non-zero when buying, and when selling, is not
    possible; "none" disables limits; None uses the region's. `trade_unit`: shares per lot, rounded
    with the help of `factor` (amounts are adjusted shares); None disables rounding; "region" uses
    the region's (us 1, cn 100, tw 1000). `region`: "us", "cn" or "tw", by default that of
    `qtorch.init`. `freq`: the frequency of the bars; None is that of the source. Costs are
    fractions of a trade's value; `min_cost` is an amount of
    money per trade; `impact_cost` is multiplied by the square of the trade's share of the bar's
    traded value and added to the cost rate. `volume_threshold`: `("current" | "cum", expression)`,
    or a mapping of "all", "buy", "sell" to such pairs: the maximum amount per bar, in adjusted
    shares; with "cum" the amount already traded that day is subtracted. `extra_quote`: a frame by
    (instrument, datetime) with quotes of additional instruments: the column $close and optionally
    other prices, $volume, $factor, limit_buy, limit_sell. `subscribe_fields`: fields or expressions
    that a strategy reads with `Market.field`. `codes`: the universe or list of instruments that
    trade; all others count as suspended. `start_time`, `end_time`: inclusive bounds of the bars
    that may be traded; a backtest beyond them raises ConfigError (in Qlib it finds no quotes).

    An instrument without a close is suspended. Differences from Qlib: `change` is computed if the
    source has no such field (Qlib then applies no limit at all); the deal price may be any
    expression; `limit_threshold` can be disabled in every region; negative costs are rejected.
    """

    def __init__(
        self,
        freq: str | None = None,
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
        *,
        region: str | None = None,
    ) -> None:
        self._freq = None if freq is None else frequency(freq)
        self.start_time = None if start_time is None else as_stamp(start_time)
        self.end_time = None if end_time is None else last_instant(end_time)
        self.codes = codes
        self.buy_field, self.sell_field = _parse_deal_prices(deal_price)
        self.subscribe_fields = tuple(subscribe_fields)
        self.limit_threshold = _parse_limit(limit_threshold, region)
        self.volume_threshold = _parse_volume_threshold(volume_threshold)
        for name in ("open_cost", "close_cost", "min_cost", "impact_cost"):
            _validate_cost(name, locals()[name])
        self.open_cost, self.close_cost = float(open_cost), float(close_cost)
        self.min_cost, self.impact_cost = float(min_cost), float(impact_cost)
        self.extra_quote = extra_quote
        self.trade_unit = _parse_trade_unit(trade_unit, region)
        self._source = source
        self._quotes: dict[tuple[Any, Any], Quotes] = {}

    @property
    def source(self) -> Source:
        """The data source of the bars: the `source` argument, or the one of `qtorch.init`."""
        if not isinstance(self._source, Source):
            config = self._source
            self._source = default_source() if config is None else build_source(config)
        return self._source

    @property
    def freq(self) -> str:
        """The frequency of the bars: the `freq` argument, or that of the source."""
        return self._freq or self.source.resolve_frequency()

    def calendar(self) -> pd.DatetimeIndex:
        """All bars of the source in ascending order."""
        return self.source.read_calendar(self.freq)

    def quotes(self, start: pd.Timestamp, end: pd.Timestamp) -> Quotes:
        """Quotes between two bars (inclusive) and of the bar before them; cached."""
        if (self.start_time or start) > start or (self.end_time or end) < end:
            raise ConfigError(
                f"the backtest goes from {start} to {end}, but the exchange's start_time and "
                f"end_time allow {self.start_time} to {self.end_time}."
            )
        if (start, end) not in self._quotes:
            self._quotes[start, end] = self._read(start, end)
        return self._quotes[start, end]

    def _read(self, start: pd.Timestamp, end: pd.Timestamp) -> Quotes:
        calendar = self.calendar()
        row = int(calendar.searchsorted(start))
        first_bar = calendar[max(0, row - 1)]
        expressions = self._quote_expressions()
        panel = self.source.feature_panel(
            self.codes,
            list(dict.fromkeys(expressions.values())),
            first_bar,
            bar_text(end),  # a date without a time would include the later bars of its day
            self.freq,
        )
        not_member = ~panel.mask.cpu().numpy()

        def read(key: str) -> Floats:
            values = panel.column(expressions[key]).cpu().numpy().astype(np.float64)
            values[not_member] = np.nan
            return values

        close = read("close")
        limit_buy, limit_sell = self._limits(close, read)
        factor = read("factor") if "factor" in expressions else None
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
            volume=read("volume") if "volume" in expressions else np.full_like(close, np.nan),
            factor=self._usable_factor(factor, close),
            limit_buy=limit_buy,
            limit_sell=limit_sell,
            buy_volume=tuple(limits[k] for k in limits if k != "sell"),
            sell_volume=tuple(limits[k] for k in limits if k != "buy"),
            fields={name: read(f"field {name}") for name in self.subscribe_fields},
        )
        return quotes if self.extra_quote is None else self._add_extra_quotes(quotes)

    def _quote_expressions(self) -> dict[str, str]:
        """The expressions to read from the source, by their purpose."""
        available = self.source.fields(self.freq)
        expressions = {"close": "$close", "buy": self.buy_field, "sell": self.sell_field}
        expressions |= {name: f"${name}" for name in ("volume", "factor") if name in available}
        if isinstance(self.limit_threshold, float):
            expressions["change"] = "$change" if "change" in available else _CHANGE
        elif self.limit_threshold is not None:
            expressions["no buying"], expressions["no selling"] = self.limit_threshold
        expressions |= {f"field {name}": _as_expression(name) for name in self.subscribe_fields}
        return expressions | {f"volume {k}": v[1] for k, v in self.volume_threshold.items()}

    def _limits(self, close: Floats, read: Any) -> tuple[Bools, Bools]:
        is_suspended = np.isnan(close)
        if self.limit_threshold is None:
            return is_suspended, is_suspended
        if isinstance(self.limit_threshold, float):
            change = read("change")
            up, down = change >= self.limit_threshold, change <= -self.limit_threshold
            return up | is_suspended, down | is_suspended
        # NaN counts as limited, as in Qlib.
        return (read("no buying") != 0) | is_suspended, (read("no selling") != 0) | is_suspended

    def _deal_price(self, price: Floats, close: Floats, side: str) -> Floats:
        missing = ~(price > ZERO_PRICE) & ~np.isnan(close)
        if missing.any():
            log.warning(
                "%d of %d prices to %s at (%s) are missing or zero; using the close instead.",
                missing.sum(),
                (~np.isnan(close)).sum(),
                side,
                self.buy_field if side == "buy" else self.sell_field,
            )
        return np.where(missing, close, price)

    def _usable_factor(self, factor: Floats | None, close: Floats) -> Floats | None:
        """The adjustment factor for rounding to lots, or None if amounts cannot be rounded."""
        if self.trade_unit is None:
            return None
        if factor is None or (np.isnan(factor) & ~np.isnan(close)).any():
            log.warning(
                "the field 'factor' is missing%s: amounts are not rounded to the trade unit of %g.",
                "" if factor is None else " on some days",
                self.trade_unit,
            )
            return None
        return factor

    def _add_extra_quotes(self, quotes: Quotes) -> Quotes:
        frame = self.extra_quote
        assert frame is not None
        if "$close" not in frame:
            raise ConfigError(f"extra_quote has no column $close, only {list(frame.columns)}.")
        if "instrument" in frame.index.names and frame.index.names[0] != "instrument":
            frame = frame.swaplevel()
        names = pd.Index(sorted(set(frame.index.get_level_values(0).astype("str"))), dtype="str")
        duplicates = names.intersection(quotes.instruments)
        if len(duplicates):
            raise ConfigError(f"extra_quote contains {list(duplicates[:5])}, also in the source.")
        all_quotes = quotes.add_instruments(names)
        columns = all_quotes.instruments.get_indexer(names)

        def column(name: str, default: Any) -> Any:
            if name not in frame:
                return default
            table = frame[name].unstack(0)
            table.columns = table.columns.astype("str")
            return table.reindex(index=all_quotes.dates, columns=names).to_numpy()

        close = column("$close", None).astype(np.float64)
        all_quotes.close[:, columns] = close
        all_quotes.buy_price[:, columns] = column(self.buy_field, close)
        all_quotes.sell_price[:, columns] = column(self.sell_field, close)
        all_quotes.volume[:, columns] = column("$volume", np.nan)
        if all_quotes.factor is not None:
            all_quotes.factor[:, columns] = column("$factor", 1.0)
        for name in ("limit_buy", "limit_sell"):
            limits = column(name, False)
            is_limited = np.isnan(close) | pd.isna(limits) | np.equal(limits, True)
            getattr(all_quotes, name)[:, columns] = is_limited
        return all_quotes


def _parse_deal_prices(deal_price: str | Sequence[str] | None) -> tuple[str, str]:
    price = "close" if deal_price is None else deal_price
    pair = (price, price) if isinstance(price, str) else price
    if len(pair) != 2 or not all(isinstance(p, str) and p for p in pair):
        raise ConfigError(
            f"deal_price={deal_price!r}: expected a field or an expression, or a pair of them "
            "(for buying and for selling)."
        )
    buy, sell = map(_as_expression, pair)
    return buy, sell


def _as_expression(text: str) -> str:
    """Prefix a bare field name with `$`; return an expression unchanged."""
    return f"${text}" if re.fullmatch(r"[A-Za-z_]\w*", text) else text


def _parse_limit(threshold: Limit, region: str | None) -> tuple[str, str] | float | None:
    if threshold is None:
        return get_region(region).limit_threshold
    if isinstance(threshold, str):
        if threshold == "none":
            return None
    elif isinstance(threshold, int | float) and not isinstance(threshold, bool):
        if 0 < threshold < math.inf:
            return float(threshold)
    elif isinstance(threshold, Sequence) and len(threshold) == 2:
        return str(threshold[0]), str(threshold[1])
    raise ConfigError(
        f"limit_threshold={threshold!r}: expected a positive fraction such as 0.095, two "
        "expressions (no buying, no selling), 'none', or null for the region's default."
    )


def _parse_volume_threshold(threshold: Any) -> dict[str, tuple[str, str]]:
    if threshold is None:
        return {}
    limits = threshold if isinstance(threshold, Mapping) else {"all": threshold}
    for side, limit in limits.items():
        check_name("side of volume_threshold", side, ("all", "buy", "sell"))
        if isinstance(limit, str) or len(limit) != 2 or limit[0] not in (CUMULATIVE, CURRENT):
            raise ConfigError(
                f"volume_threshold: {side}={limit!r}; expected a pair of 'cum' or 'current' and "
                "an expression, such as ('cum', '0.1 * $volume')."
            )
    return {side: (str(limit[0]), str(limit[1])) for side, limit in limits.items()}


def _parse_trade_unit(trade_unit: float | str | None, region: str | None) -> float | None:
    unit = get_region(region).trade_unit if trade_unit == "region" else trade_unit
    if unit is None or (isinstance(unit, int | float) and unit > 0):
        return unit
    raise ConfigError(f"trade_unit={trade_unit!r}: expected shares per lot, null, or 'region'.")


def _validate_cost(name: str, value: Any) -> None:
    upper_limit = 1 if name in ("open_cost", "close_cost") else math.inf
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value < upper_limit:
        expected = {
            "min_cost": "zero or more, an amount of money",
            "impact_cost": "zero or more, a factor of the squared share of the bar's traded value",
        }.get(name, "zero or more and below 1, a fraction of the trade's value (5 bp: 0.0005)")
        raise ConfigError(f"{name}={value!r}: expected {expected}.")
