"""The exchange: deal prices, trading restrictions and transaction costs."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import pandas as pd

from qtorch.backtest.quote_lookup import QuoteLookup
from qtorch.backtest.quotes import (
    ZERO_PRICE,
    Bools,
    Floats,
    Indices,
    Quotes,
    VolumeLimit,
    add_extra_quotes,
    drop_zero_closes,
    price_moves,
    rows_after_last,
)
from qtorch.core.configured import Configured
from qtorch.core.dates import as_stamp, bar_text, frequency, last_instant
from qtorch.core.errors import ConfigError, check_name
from qtorch.core.session import get_region
from qtorch.core.trust import trust_subclasses
from qtorch.data.source.base import Instruments, Source
from qtorch.data.source.frame import build_source, default_source

Region: TypeAlias = Literal["region"]
Limit: TypeAlias = tuple[str, str] | Sequence[str] | float | Literal["none"] | None

log = logging.getLogger(__name__)

CUMULATIVE, CURRENT = "cum", "current"


@trust_subclasses
class Exchange(QuoteLookup, Configured):
    """Deal prices, price limits, trade units and costs of a market; corresponds to Qlib's Exchange.

    `deal_price`: a field or an expression ("close", "$open", "Ref($open, -1)"), or a pair of them,
    for buying and for selling; a missing price is replaced by the close. `limit_threshold`: a
    fraction (no buying if the deal price is that much above the last close of the day before, no
    selling if it is that much below), or two expressions that are non-zero when buying, and when
    selling, is not possible; "none" disables limits; None uses the region's. `trade_unit`: shares
    per lot, rounded with the help of `factor` (amounts are adjusted shares); None disables
    rounding; "region" uses the region's (us 1, cn 100, tw 1000). `region`: "us", "cn" or "tw", by
    default that of `qtorch.init`. `freq`: the frequency of the bars; None is that of the source.
    Costs are fractions of a trade's value; `min_cost` is an amount of money per trade;
    `impact_cost` is multiplied by the square of the trade's share of the bar's traded value and
    added to the cost rate; `lending_fee` is the yearly fee for borrowing, as a fraction of the
    value of the short positions, charged for each calendar day between two bars (a 365th part of
    it). `volume_threshold`: `("current" | "cum", expression)`, or a mapping of "all", "buy", "sell"
    to such pairs: the maximum amount per bar, in adjusted shares; with "cum" the amount already
    traded that day is subtracted. `extra_quote`: a frame by (instrument, datetime) with quotes of
    additional instruments: the column $close and optionally other prices, $volume, $factor,
    limit_buy, limit_sell. `subscribe_fields`: fields or expressions that a strategy reads with
    `Market.field`. `codes`: the universe or list of instruments that trade; all others count as
    suspended. `start_time`, `end_time`: inclusive bounds of the bars that may be traded; a backtest
    beyond them raises ConfigError (in Qlib it finds no quotes).

    An instrument without a close is suspended; a close of 0 or below is a missing bar. The close
    before is that of the last bar, over any gap: the field `change` (close / close before - 1)
    tells it, else the closes do. Differences from Qlib: a limit is judged by the deal price (Qlib
    judges an order at the open by a close that is not known yet), against the day before (Qlib
    compares bars within a day with the bar before, as exchanges do not) and also without a field
    `change` (Qlib then applies no limit); a close of 0 is no bar (a backtest with `as_qlib=True`
    keeps Qlib's rules in these four); the deal price may be any expression; `limit_threshold` can
    be disabled in every region; negative costs are rejected.
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
        lending_fee: float = 0.0,
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
        for name in ("open_cost", "close_cost", "min_cost", "impact_cost", "lending_fee"):
            _validate_cost(name, locals()[name])
        self.open_cost, self.close_cost = float(open_cost), float(close_cost)
        self.min_cost, self.impact_cost = float(min_cost), float(impact_cost)
        self.lending_fee = float(lending_fee)
        self.extra_quote = extra_quote
        self.trade_unit = _parse_trade_unit(trade_unit, region)
        self._source = source
        self._quotes: dict[tuple[Any, Any, bool], Quotes] = {}

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

    def check_names(self) -> None:
        """Raise DataError for a field, an instrument or a frequency that the source does not have.

        Bars are not read, unless the source reads them to know its names.
        """
        self.calendar()
        expressions = self._quote_expressions(as_qlib=False).values()
        self.source.check_expressions(expressions, self.freq)
        self.source.check_instruments(self.codes)

    def calendar(self) -> pd.DatetimeIndex:
        """All bars of the source in ascending order."""
        return self.source.read_calendar(self.freq)

    def quotes(self, start: pd.Timestamp, end: pd.Timestamp, *, as_qlib: bool = False) -> Quotes:
        """Quotes between two bars (inclusive) and of the bar before them; cached.

        `as_qlib` keeps closes of 0 and judges limits by the field `change` alone.
        """
        if (self.start_time or start) > start or (self.end_time or end) < end:
            raise ConfigError(
                f"the backtest goes from {start} to {end}, but the exchange's start_time and "
                f"end_time allow {self.start_time} to {self.end_time}."
            )
        key = start, end, as_qlib
        if key not in self._quotes:
            self._quotes[key] = self._read(start, end, as_qlib)
        return self._quotes[key]

    def _read(self, start: pd.Timestamp, end: pd.Timestamp, as_qlib: bool) -> Quotes:
        calendar = self.calendar()
        row = int(calendar.searchsorted(start))
        # The price limit of bars within a day needs that day, and the last bar of the day before.
        first_row = max(0, int(calendar.searchsorted(start.normalize())) - 1)
        expressions = self._quote_expressions(as_qlib)
        panel = self.source.feature_panel(
            self.codes,
            list(dict.fromkeys(expressions.values())),
            calendar[first_row],
            bar_text(end),  # a date without a time would include the later bars of its day
            self.freq,
        )
        not_member = ~panel.mask.cpu().numpy()

        def read(key: str) -> Floats:
            values = panel.column(expressions[key]).cpu().numpy().astype(np.float64)
            values[not_member] = np.nan
            return values

        close = read("close") if as_qlib else drop_zero_closes(read("close"), panel.instruments)
        deal_prices = [
            close if expressions[side] == "$close" else self._deal_price(read(side), close, side)
            for side in ("buy", "sell")
        ]
        change = read("change") if "change" in expressions else None
        if as_qlib:
            earlier_close, end_row = (
                np.full(close.shape[1], np.nan),
                np.full(close.shape[1], len(close)),
            )
            moves = [np.full_like(close, np.nan) if change is None else change] * 2
        else:
            earlier_close, end_row = self._bars_outside(close, panel.calendar, panel.instruments)
            before = change, earlier_close, panel.calendar
            moves = [price_moves(deal_prices[0], close, *before)] * 2
            if deal_prices[1] is not deal_prices[0]:
                moves[1] = price_moves(deal_prices[1], close, *before)
        limit_buy, limit_sell = self._limits(close, moves, read)
        factor = read("factor") if "factor" in expressions else None
        limits = {
            k: VolumeLimit(read(f"volume {k}"), v[0] == CUMULATIVE)
            for k, v in self.volume_threshold.items()
        }
        quotes = Quotes(
            panel.calendar,
            row - first_row,
            panel.instruments,
            close=close,
            buy_price=deal_prices[0],
            sell_price=deal_prices[1],
            volume=read("volume") if "volume" in expressions else np.full_like(close, np.nan),
            factor=self._usable_factor(factor, close),
            limit_buy=limit_buy,
            limit_sell=limit_sell,
            earlier_close=earlier_close,
            end_row=end_row,
            low=read("low") if "low" in expressions else None,
            high=read("high") if "high" in expressions else None,
            buy_volume=tuple(limits[k] for k in limits if k != "sell"),
            sell_volume=tuple(limits[k] for k in limits if k != "buy"),
            fields={name: read(f"field {name}") for name in self.subscribe_fields},
        )
        if self.extra_quote is None:
            return quotes
        fields = self.buy_field, self.sell_field
        return add_extra_quotes(quotes, self.extra_quote, fields, as_qlib=as_qlib)

    def _quote_expressions(self, as_qlib: bool) -> dict[str, str]:
        """The expressions to read from the source, by their purpose."""
        fields = ("volume", "factor", "low", "high")
        available = self.source.find_fields([*fields, "change"], self.freq)
        expressions = {"close": "$close", "buy": self.buy_field, "sell": self.sell_field}
        expressions |= {name: f"${name}" for name in fields if name in available}
        if isinstance(self.limit_threshold, float):
            if "change" in available:
                expressions["change"] = "$change"
            elif as_qlib:
                log.warning("the source has no field 'change': as in Qlib, no price limit applies.")
        elif self.limit_threshold is not None:
            expressions["no buying"], expressions["no selling"] = self.limit_threshold
        expressions |= {f"field {name}": _as_expression(name) for name in self.subscribe_fields}
        return expressions | {f"volume {k}": v[1] for k, v in self.volume_threshold.items()}

    def _bars_outside(
        self, close: Floats, dates: pd.DatetimeIndex, instruments: pd.Index
    ) -> tuple[Floats, Indices]:
        """Look for bars before and after those of `close [D, N]`: `earlier_close` and `end_row`.

        Only instruments without a close on the first, or on the last, of the dates are read.
        """
        earlier_close = np.full(len(instruments), np.nan)
        end_row = rows_after_last(close)
        calendar = self.calendar()
        first, last = calendar.searchsorted(dates[[0, -1]])
        absent = instruments[np.isnan(close[0])]
        for name, values in self._closes(absent, calendar[:first]).items():
            earlier_close[instruments.get_loc(name)] = values[-1]
        for name in self._closes(instruments[end_row < len(close)], calendar[last + 1 :]):
            end_row[instruments.get_loc(name)] = len(close)
        return earlier_close, end_row

    def _closes(self, names: pd.Index, dates: pd.DatetimeIndex) -> dict[str, Floats]:
        """The closes between dates of those instruments that have any there, by name."""
        if not len(names) or not len(dates):
            return {}
        members: Any = (
            self.source.instruments(self.codes) if isinstance(self.codes, str) else self.codes
        )
        if isinstance(members, Mapping):
            members = {
                name: members[name]
                for name in names
                if any(
                    as_stamp(a) <= dates[-1] and last_instant(b) >= dates[0]
                    for a, b in members.get(name, ())
                )
            }
        else:
            members = list(names)
        if not members:
            return {}
        panel = self.source.feature_panel(members, ["$close"], dates[0], dates[-1], self.freq)
        values = panel.column("$close").cpu().numpy().astype(np.float64)
        is_bar = panel.mask.cpu().numpy() & (values > ZERO_PRICE)
        return {
            str(name): values[is_bar[:, k], k]
            for k, name in enumerate(panel.instruments)
            if is_bar[:, k].any()
        }

    def _limits(
        self, close: Floats, moves: Sequence[Floats], read: Callable[[str], Floats]
    ) -> tuple[Bools, Bools]:
        """Whether each instrument cannot be bought, and cannot be sold, at prices moved so far."""
        is_suspended, threshold = np.isnan(close), self.limit_threshold
        if threshold is None:
            return is_suspended, is_suspended
        if isinstance(threshold, float):
            return (moves[0] >= threshold) | is_suspended, (moves[1] <= -threshold) | is_suspended
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
            lots = "shares" if self.trade_unit == 1 else f"lots of {self.trade_unit:g} shares"
            # Fractions of a share change next to nothing, those of a lot may.
            log.log(
                logging.INFO if self.trade_unit == 1 else logging.WARNING,
                "the bars have no field 'factor' (adjusted price / traded price)%s, from which the "
                "traded shares follow: the backtest trades fractions of %s.",
                "" if factor is None else " on some days",
                lots,
            )
            return None
        return factor


def _parse_deal_prices(deal_price: str | Sequence[str] | None) -> tuple[str, str]:
    price = "close" if deal_price is None else deal_price
    pair = (price, price) if isinstance(price, str | int | float) else price
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
            "lending_fee": "zero or more, a fraction of the short positions' value per year",
        }.get(name, "zero or more and below 1, a fraction of the trade's value (5 bp: 0.0005)")
        raise ConfigError(f"{name}={value!r}: expected {expected}.")
