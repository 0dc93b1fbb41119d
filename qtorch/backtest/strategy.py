"""The strategy interface: decide the orders of a bar from the scores of the previous bar."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import pandas as pd

from qtorch.backtest.account import Account, Fills, Orders, is_close
from qtorch.backtest.exchange import Exchange
from qtorch.backtest.market import Market
from qtorch.backtest.positions import Position
from qtorch.backtest.quotes import Bools, Floats, Indices
from qtorch.backtest.scores import score_frame
from qtorch.core.configured import Configured
from qtorch.core.errors import ConfigError, DataError, check_name, refuse_old_names
from qtorch.core.trust import trust_subclasses


@dataclass(frozen=True)
class StepContext:
    """The information available to a strategy at one bar, for M members and N instruments.

    `step` counts the bars from 0. `score [M, N]` are the scores of the previous bar (NaN: no
    score); it is None if no member has a score or the strategy has no signal. `market` is the bar
    at which the orders are executed, `previous` the bar before it (None at the first bar of the
    calendar). `traded_today [M, N]` are the amounts traded earlier on the same day (None: ignore
    them). With `as_qlib` a strategy follows Qlib where Qlib is wrong about money. A strategy must
    not modify the scores, the account and the amounts.
    """

    step: int
    instruments: pd.Index
    score: Floats | None
    market: Market
    previous: Market | None
    account: Account
    traded_today: Floats | None = None
    as_qlib: bool = False

    @property
    def date(self) -> pd.Timestamp:
        """The bar at which the orders are executed."""
        return self.market.date

    def preview_sales(self, sales: Orders) -> Fills:
        """The fills that sales would have if they were executed now; books nothing."""
        return self.market.preview_sales(sales, self.account, self.traded_today)

    def proceeds(self, sales: Orders) -> Floats:
        """The cash `[M]` that sales would yield after costs if executed now; books nothing."""
        fills, num_members = self.preview_sales(sales), len(self.account.cash)
        sums: Any = np.bincount(sales.member, fills.value - fills.cost, minlength=num_members)
        proceeds: Floats = sums  # weighted counts are float64, which the stubs do not say
        return proceeds


@trust_subclasses
class Strategy(Configured, ABC):
    """Decides the orders of each bar. Subclasses implement `decide`.

    `signal`: scores as a frame or series by (datetime, instrument), `(model, dataset)`, or None
    for a strategy without scores. A frame with several columns runs one member per column in the
    same pass, each with its own account. `risk_degree` is the fraction of the account to invest; a
    subclass that times the market overrides `get_risk_degree`.
    """

    allow_short: ClassVar[bool] = False
    """Whether sales may exceed the position and so open a short position."""
    needs_signal: ClassVar[bool] = False
    """Whether `signal` may not be None."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        refuse_old_strategy_names(cls)

    def __init__(self, *, signal: Any = None, risk_degree: float = 0.95) -> None:
        if not isinstance(risk_degree, int | float) or not 0 < risk_degree <= 1:
            raise ConfigError(
                f"risk_degree={risk_degree!r}: expected a fraction above 0 and at most 1."
            )
        if signal is None and self.needs_signal:
            raise ConfigError(
                f"{type(self).__name__} needs a signal: scores, (model, dataset), or <PRED> in a "
                "record."
            )
        self.risk_degree = float(risk_degree)
        self.signal = signal

    def scores(self) -> pd.DataFrame | None:
        """The scores by (datetime, instrument), one column per member."""
        return None if self.signal is None else score_frame(self.signal)

    def get_risk_degree(self, trade_step: int | None = None) -> float:
        """The fraction of the account to invest at a bar, which `trade_step` counts from 0."""
        return self.risk_degree

    def read_risk_degree(self, step: int) -> float:
        """`get_risk_degree` of a bar; raises ConfigError unless it is a fraction from 0 to 1."""
        degree: Any = self.get_risk_degree(step)  # a user's own method may return anything
        if not isinstance(degree, int | float | np.number) or not 0 <= degree <= 1:
            raise ConfigError(
                f"{type(self).__name__}.get_risk_degree({step}) is {degree!r}; expected a fraction "
                "from 0 to 1."
            )
        return float(degree)

    def start(
        self,
        exchange: Exchange,
        instruments: pd.Index,
        dates: pd.DatetimeIndex,
        universe: Bools,
    ) -> None:
        """Called once before the first bar.

        `dates` are the trading bars; `universe [N]` marks the instruments that have bars and, if
        the strategy has a signal, scores.
        """

    @abstractmethod
    def decide(self, context: StepContext) -> Orders:
        """Return the orders of a bar."""


def refuse_old_strategy_names(strategy: Strategy | type[Strategy]) -> None:
    """Raise ConfigError for the former name of `allow_short`."""
    # A number called `short` is a user's own argument, such as the length of a window.
    if isinstance(getattr(strategy, "short", None), bool):
        refuse_old_names(strategy, {"short": "allow_short"})


class TopkDropoutStrategy(Strategy):
    """Holds at most `topk` instruments and replaces the `n_drop` worst of them on each bar.

    On each bar, the candidates are the best instruments not yet held: `n_drop` of them, plus one
    for each free slot. Candidates and holdings are ranked together, and the holdings among the
    `n_drop` worst are sold; the best candidates fill the slots that are free after the sales that
    can be executed: a holding that is suspended, at its limit, or held too short keeps its slot.
    The cash after the sales, times `risk_degree`, is split evenly over the purchases.
    `method_sell`: "bottom", or "random" (any `n_drop` holdings); `method_buy`: "top", or "random"
    (any of the best `topk`). A position is not sold before it has been held for `hold_thresh`
    bars. `only_tradable`: instruments that cannot be traded at this bar are excluded from the
    ranking. `forbid_all_trade_at_limit`: an instrument at either price limit is not traded at all;
    otherwise sales at the upper limit and purchases at the lower limit are allowed. Instruments
    without a score rank last and are never bought. Equal scores are ranked by instrument name.

    Corresponds to Qlib's strategy of that name (contrib/strategy/signal_strategy.py). Differences:
    a sale that was not made frees no slot (Qlib buys for it all the same and ends up with more than
    `topk` positions), and `get_risk_degree` of a subclass is asked (Qlib's strategy reads
    `risk_degree`); `as_qlib=True` of the backtest gives Qlib's rule for both. `n_drop=0` sells
    nothing (Qlib sells everything); with more than `topk + n_drop` holdings nothing is bought
    (Qlib's negative slice buys nearly everything); instruments without a score (NaN) are not
    bought; random choices depend on `seed` and are the same for every member.
    """

    needs_signal: ClassVar[bool] = True

    def __init__(
        self,
        *,
        topk: int,
        n_drop: int,
        signal: Any = None,
        method_sell: Literal["bottom", "random"] = "bottom",
        method_buy: Literal["top", "random"] = "top",
        hold_thresh: int = 1,
        only_tradable: bool = False,
        forbid_all_trade_at_limit: bool = True,
        risk_degree: float = 0.95,
        seed: int = 0,
    ) -> None:
        super().__init__(signal=signal, risk_degree=risk_degree)
        _check_count("topk", topk, 1)
        _check_count("n_drop", n_drop, 0)
        check_name("method_sell", method_sell, ("bottom", "random"))
        check_name("method_buy", method_buy, ("top", "random"))
        self.topk, self.n_drop = topk, n_drop
        self.method_sell, self.method_buy = method_sell, method_buy
        self.hold_thresh = hold_thresh
        self.only_tradable = only_tradable
        self.forbid_all_trade_at_limit = forbid_all_trade_at_limit
        self.seed = seed

    def start(
        self,
        exchange: Exchange,
        instruments: pd.Index,
        dates: pd.DatetimeIndex,
        universe: Bools,
    ) -> None:
        _check_universe(self.topk, universe)

    def decide(self, context: StepContext) -> Orders:
        """Sell the worst holdings, then buy the best candidates."""
        if context.score is None:
            return Orders.empty()
        account = context.account
        is_eligible = context.market.is_tradable() if self.only_tradable else None
        num_held = account.count_positions()
        candidates = self._candidates(context, is_eligible, num_held)
        holding, is_worst = self._worst(context, is_eligible, num_held, candidates)
        sales = self._sales(holding, is_worst, context)
        fills = context.preview_sales(sales)
        num_members = len(num_held)
        if context.as_qlib:
            num_sold: Any = np.add.reduce(is_worst, axis=1)
            risk_degree = self.risk_degree
        else:
            is_closed = is_close(fills.amount, sales.amount) & (fills.amount > 0)
            num_sold = np.bincount(sales.member, is_closed, minlength=num_members)
            risk_degree = self.read_risk_degree(context.step)
        proceeds = np.bincount(sales.member, fills.value - fills.cost, minlength=num_members)
        is_bought = candidates.is_before(self.topk - num_held + num_sold)
        cash = (account.cash + proceeds) * risk_degree
        return sales.append(self._purchases(candidates.column, is_bought, cash, context))

    def _candidates(
        self, context: StepContext, is_eligible: Bools | None, num_held: Indices
    ) -> _Choice:
        """The instruments to consider buying, best first: `n_drop` and one for each free slot."""
        score, places = context.score, context.account.places()
        assert score is not None
        max_count = np.maximum(self.topk + self.n_drop - num_held, 0)
        keys = np.negative(score)
        if is_eligible is not None:
            keys[:, ~is_eligible] = np.nan
        if self.method_buy == "top":
            keys.reshape(-1)[places] = np.nan
            choice = _choose_lowest(keys, int(max_count.max()))
            return choice.keep_first(max_count)
        best = _choose_lowest(keys, self.topk)
        is_held = _take_rows(context.account.is_held, best.column)
        choice = best._replace(is_filled=best.is_filled & ~is_held)
        return self._draw_random(choice, max_count, context.step, 0)

    def _worst(
        self,
        context: StepContext,
        is_eligible: Bools | None,
        num_held: Indices,
        candidates: _Choice,
    ) -> tuple[Indices, Bools]:
        """Up to `n_drop` of the holdings of each member to sell: instruments `[M, K]`, and which.

        A member without any score on this bar does not trade.
        """
        score, places = context.score, context.account.places()
        assert score is not None
        values = score.reshape(-1)[places]
        keys = np.fmax(values, -np.inf)  # without a score a holding is the worst
        instrument = places % score.shape[1]
        if is_eligible is not None:
            keys[~is_eligible[instrument]] = np.nan
        if np.count_nonzero(candidates.is_filled[:, :1]) < len(score):  # else all have scores
            is_active = ~np.isnan(score).all(axis=1)
            keys[~np.repeat(is_active, num_held)] = np.nan
        key_table = _tabulate(keys, num_held, np.nan)
        instrument_table = _tabulate(instrument, num_held, 0)
        if self.method_sell == "random":
            best = _choose_lowest(-key_table, key_table.shape[1])
            drop_count = np.full(len(score), self.n_drop)
            drawn = self._draw_random(best, drop_count, context.step, 1)
            return _take_rows(instrument_table, drawn.column), drawn.is_filled
        # Of equal scores the last name is the worst.
        key_table, instrument_table = key_table[:, ::-1], instrument_table[:, ::-1]
        worst = _choose_lowest(key_table, self.n_drop)
        holding = _take_rows(instrument_table, worst.column)
        # Candidates that are worse than a holding stand before it in the common ranking.
        num_worse = _count_worse(candidates, holding, worst.key, self.n_drop)
        is_worst = worst.is_filled & (num_worse + np.arange(holding.shape[1]) < self.n_drop)
        return holding, is_worst

    def _draw_random(self, choice: _Choice, max_count: Indices, step: int, stream: int) -> _Choice:
        """Draw up to `max_count [M]` of the instruments of each member without replacement.

        `stream` separates the random numbers of purchases (0) and sales (1).
        """
        is_drawn = np.zeros_like(choice.is_filled)
        for member, count in enumerate(max_count):
            columns = choice.is_filled[member].nonzero()[0]
            random = np.random.default_rng([self.seed, step, stream])
            drawn = random.choice(columns, min(int(count), len(columns)), replace=False)
            is_drawn[member, drawn] = True
        return choice._replace(is_filled=is_drawn)

    def _sales(self, holding: Indices, is_worst: Bools, context: StepContext) -> Orders:
        """Sell those of the worst holdings that can be sold, in the order of their names."""
        member, column = is_worst.nonzero()
        if not len(member):
            return Orders.empty()
        account = context.account
        is_tradable = context.market.is_tradable(None if self.forbid_all_trade_at_limit else "sell")
        place = member * len(is_tradable) + holding[member, column]
        place.sort()
        member, instrument = np.divmod(place, len(is_tradable))
        is_sold = is_tradable[instrument]
        if self.hold_thresh > 0:
            is_sold &= account.count_bars(place) >= self.hold_thresh
        if np.count_nonzero(is_sold) < len(place):
            place, member, instrument = place[is_sold], member[is_sold], instrument[is_sold]
        amount = account.amount.reshape(-1)[place]
        return Orders(member, instrument, amount, np.zeros(len(place), dtype=np.bool_))

    def _purchases(
        self, candidates: Indices, is_bought: Bools, cash: Floats, context: StepContext
    ) -> Orders:
        """Split the cash `[M]` equally over the purchases, in rank order.

        The share of an instrument that cannot be bought stays in cash.
        """
        member, column = is_bought.nonzero()
        if not len(member):
            return Orders.empty()
        instrument = candidates[member, column]
        share = cash / np.maximum(np.bincount(member, minlength=len(cash)), 1)
        can_buy = context.market.is_tradable(None if self.forbid_all_trade_at_limit else "buy")[
            instrument
        ]
        if np.count_nonzero(can_buy) < len(member):
            member, instrument = member[can_buy], instrument[can_buy]
        amount = share[member] / context.market.price("buy")[instrument]
        amount = context.market.round_lots(amount, instrument)
        return Orders(member, instrument, amount, instrument >= 0)


def _check_count(name: str, value: int, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(f"{name}={value!r}: expected a whole number, at least {minimum}.")


def _check_universe(topk: int, universe: Bools) -> None:
    if topk > universe.sum():
        raise ConfigError(
            f"topk={topk} is more than the {int(universe.sum())} instruments that have both scores "
            "and bars."
        )


class _Choice(NamedTuple):
    """Columns of each member in an order, with their keys `[M, K]`, and which places are filled."""

    column: Indices
    key: Floats
    is_filled: Bools

    def is_full(self) -> bool:
        """Whether all places of all members are filled."""
        return bool(np.count_nonzero(self.is_filled) == self.is_filled.size)

    def keep_first(self, count: Indices) -> _Choice:
        """Keep the first `count [M]` places of each member."""
        width = self.key.shape[1]
        if np.minimum.reduce(count) >= width:
            return self
        return self._replace(is_filled=self.is_filled & (np.arange(width) < count[:, None]))

    def is_before(self, count: Indices) -> Bools:
        """`[M, K]`: whether a place is one of the first `count [M]` that are filled."""
        if self.is_full():
            return np.arange(self.key.shape[1]) < count[:, None]
        rank = np.cumsum(self.is_filled, axis=1) - 1
        return self.is_filled & (rank < count[:, None])


_MAX_SORTED = 256  # more keys are partitioned before they are sorted


def _choose_lowest(keys: Floats, count: int) -> _Choice:
    """Choose the columns of the `count` lowest keys `[M, W]` of each member, lowest first.

    Equal keys stay in the order of their columns. A key that is NaN is never chosen.
    """
    num_members, width = keys.shape
    count = max(min(count, width), 0)
    if count in (0, width) or keys.size <= _MAX_SORTED:
        column = keys.argsort(axis=1, kind="stable")[:, :count]
        key = _take_rows(keys, column)
        return _Choice(column, key, np.equal(key, key))  # not NaN
    # Only the keys up to each member's last one that counts are sorted; NaN comes after them.
    limit = np.fmin(np.partition(keys, count - 1, axis=1)[:, count - 1, None], np.inf)
    place = (keys <= limit).reshape(-1).nonzero()[0]
    member, column = np.divmod(place, width) if num_members > 1 else (None, place)
    num_low = None if member is None else np.bincount(member, minlength=num_members)
    column_table = _tabulate(column, num_low, 0)
    key_table = _tabulate(keys.reshape(-1)[place], num_low, np.nan)
    order = key_table.argsort(axis=1, kind="stable")[:, :count]
    key = _take_rows(key_table, order)
    return _Choice(_take_rows(column_table, order), key, np.equal(key, key))


def _tabulate(values: Any, count: Indices | None, fill: float) -> Any:
    """Arrange values that are sorted by member as `[M, W]`: `count [M]` of each, then `fill`.

    `count` may be None for one member.
    """
    if count is None or len(count) == 1:
        return values[None]
    width = int(count.max())
    if len(values) == width * len(count):
        return values.reshape(len(count), width)
    table = np.full((len(count), width), fill, dtype=values.dtype)
    table[np.arange(width) < count[:, None]] = values
    return table


def _take_rows(table: Any, column: Indices) -> Any:
    """Take the columns `[M, K]` of each row of `table [M, W]`."""
    if len(table) == 1:
        return table[:, column[0]]
    return table[np.arange(len(table))[:, None], column]


def _count_worse(candidates: _Choice, holding: Indices, key: Floats, count: int) -> Any:
    """`[M, K]`: how many of the worst `count` candidates are worse than each holding `[M, K]`.

    `key [M, K]` are the scores of the holdings, -inf without one, worst first; those of the
    candidates are negative, best first. Of equal scores the last name is the worst.
    """
    instrument, cost, is_filled = candidates.column, candidates.key, candidates.is_filled
    if not candidates.is_full():  # the last candidates of a member are not the last columns
        last = np.argsort(is_filled, axis=1, kind="stable")
        instrument, cost, is_filled = (_take_rows(t, last) for t in candidates)
    elif not (cost.size and key.size) or (-cost[:, -1] > np.fmax.reduce(key, axis=1)).all():
        return 0  # as on most days, the worst candidate is better than each of these holdings
    first = max(instrument.shape[1] - count, 0)
    instrument, is_filled = instrument[:, None, first:], is_filled[:, None, first:]
    candidate_key = -cost[:, None, first:]
    is_worse = candidate_key < key[:, :, None]
    is_tie = candidate_key == key[:, :, None]
    is_worse |= is_tie & (instrument > holding[:, :, None])
    is_worse &= is_filled
    return np.add.reduce(is_worse, axis=2)


class WeightStrategyBase(Strategy):
    """Base class of strategies that trade towards target weights; subclasses compute the weights.

    They do so in `target_weights` for all members at once, or in Qlib's
    `generate_target_weight_position` for one account.

    The scores may also be a table with one row per date and one column per instrument. Amounts are
    computed from the account's value and the closes of the previous bar, so all that the orders
    know of their own bar is which instruments can be traded. Corresponds to Qlib's
    WeightStrategyBase with OrderGenWOInteract. Difference: if the cash does not cover all purchases
    they are executed in the order of instrument names, while Qlib shuffles them.
    """

    def scores(self) -> pd.DataFrame | None:
        signal = self.signal
        if isinstance(signal, pd.DataFrame) and not isinstance(signal.index, pd.MultiIndex):
            table: Any = signal  # the type stubs do not know that stack() returns a series
            signal = table.stack().rename("weight")
        return None if signal is None else score_frame(signal)

    def target_weights(self, context: StepContext) -> Floats:
        """Return the target weights `[M, N]` as fractions of the account times `risk_degree`.

        A member whose row is all NaN does not trade. By default the weights are those of
        `generate_target_weight_position`, for each member that has a score.
        """
        weights = np.full(context.account.amount.shape, np.nan)
        date = context.date
        is_daily = date == date.normalize()
        end = date + pd.Timedelta(days=1, seconds=-1) if is_daily else date
        for k, member_scores in enumerate([] if context.score is None else context.score):
            score = pd.Series(member_scores, context.instruments, name="score").dropna()
            if score.empty:
                continue
            targets = self.generate_target_weight_position(
                score=score,
                current=_read_position(context, k),
                trade_start_time=date,
                trade_end_time=end,
            )
            weights[k] = 0.0
            for name, weight in targets.items():
                check_name("instrument of a target weight", name, context.instruments)
                weights[k, context.instruments.get_loc(name)] = weight
        return weights

    def generate_target_weight_position(
        self,
        score: pd.Series,
        current: Position,
        trade_start_time: pd.Timestamp,
        trade_end_time: pd.Timestamp,
    ) -> Mapping[str, float]:
        """Return one account's target weights by instrument; those without one are sold.

        `score` are the scores of the previous bar by instrument, without those that have none,
        `current` is the account before the trades, `trade_start_time` the bar of the trades.
        """
        raise ConfigError(
            f"{type(self).__name__} needs a method target_weights(context), or Qlib's "
            "generate_target_weight_position(score, current, trade_start_time, trade_end_time)."
        )

    def decide(self, context: StepContext) -> Orders:
        """Return the orders that move the positions to the target weights, sales first."""
        if context.score is None and self.signal is not None:
            return Orders.empty()
        account, market = context.account, context.market
        weights = self.target_weights(context)
        has_target = ~np.isnan(weights).all(axis=1, keepdims=True)
        target = self.target_amounts(np.nan_to_num(weights), context)
        delta = target - account.amount
        rounded_amount = market.round_lots(np.abs(delta), np.arange(delta.shape[1]))
        # Closing a position includes its odd lots, so that order is not rounded.
        size = np.where(target == 0, np.abs(delta), rounded_amount)
        can_trade = has_target & market.is_tradable()
        sales = Orders.from_mask(can_trade & (delta < 0) & (size > 0), size, buying=False)
        return sales.append(
            Orders.from_mask(can_trade & (delta > 0) & (size > 0), size, buying=True)
        )

    def target_amounts(self, weights: Floats, context: StepContext) -> Floats:
        """Return the amounts `[M, N]` to hold for target weights `[M, N]` (0 for none)."""
        account, market = context.account, context.market
        risk_degree = self.read_risk_degree(context.step)
        value = np.maximum(account.value(), 0.0)[:, None] * risk_degree
        was_tradable = np.zeros_like(market.is_suspended)
        previous_close = np.full_like(market.close, np.nan)
        if context.previous is not None:
            was_tradable, previous_close = (
                context.previous.is_tradable() & market.is_tradable(),
                context.previous.close,
            )
        price = np.where(was_tradable, previous_close, account.price)
        with np.errstate(invalid="ignore"):
            target: Floats = np.nan_to_num(value * weights / price)
        return target


def _read_position(context: StepContext, member: int) -> Position:
    """Return a member's account as Qlib's Position, before the trades of the bar."""
    account = context.account
    value = float(account.value()[member])
    holdings = {
        str(context.instruments[int(k)]): {
            "amount": float(account.amount[member, k]),
            "price": float(account.price[member, k]),
            "count_day": int(account.count[member, k]),
            "weight": float(account.amount[member, k] * account.price[member, k] / value),
        }
        for k in np.flatnonzero(account.amount[member])
    }
    return Position(float(account.cash[member]), holdings)


class WeightStrategy(WeightStrategyBase):
    """Trades towards the weights in its signal.

    `signal`: the target weights as fractions of the account times `risk_degree`, as a series or
    frame by (datetime, instrument), or as a table with one row per date and one column per
    instrument. Like scores, the weights of a bar are traded at the next bar. On a date with
    weights, instruments without a weight are sold; on a date without any weights nothing is
    traded.
    """

    def scores(self) -> pd.DataFrame | None:
        weights = super().scores()
        if weights is None:
            return None
        lowest = float(weights.min().min())
        if lowest < 0 and not self.allow_short:
            raise DataError(
                f"a target weight is {lowest:g}, but WeightStrategy holds long positions only; use "
                "LongShortStrategy to sell short."
            )
        total = float(weights.groupby(level=0).sum().max().max())
        if total > 1 + 1e-5:
            raise DataError(
                f"the target weights of a day sum to {total:g}; they are fractions of the account "
                "and may sum to at most 1."
            )
        return weights

    def target_weights(self, context: StepContext) -> Floats:
        assert context.score is not None
        has_weights = (~np.isnan(context.score)).any(axis=1, keepdims=True)
        return np.where(has_weights, np.nan_to_num(context.score), np.nan)


class SoftTopkStrategy(WeightStrategyBase):
    """Holds the best `topk` instruments and moves weight from the others to them by and by.

    On each bar the holdings that are not among the best `topk` lose weight, each at most
    `max_sold_weight` (a fraction of the value of all holdings). What they lose goes to the best:
    `buy_method="first_fill"` fills each up to 1 / topk, the best first; "average_fill" divides it
    equally. An empty account buys the best, each for 1 / topk. The weights are shares of what is
    invested: the tradable holdings and the cash, less 1 - `risk_degree` of the account and the
    costs, are divided over the instruments that can be traded. With `at_trade_prices` amounts
    follow from the deal prices of the trade bar; otherwise from the previous bar's closes, as in
    WeightStrategyBase. Equal scores are ranked by instrument name.

    Corresponds to Qlib's strategy of that name (contrib/strategy/cost_control.py) with its
    OrderGenWInteract, or OrderGenWOInteract without `at_trade_prices`. Differences: Qlib's cannot
    be built, because it hands its arguments on in the wrong way; Qlib fills up the best in the
    random order of a set; a suspended holding counts by its last close (in Qlib the amounts become
    NaN); and amounts are only rounded to trade units, while Qlib rounds adjusted amounts down to
    whole numbers (`as_qlib=True` of the backtest does so too).
    """

    needs_signal: ClassVar[bool] = True

    def __init__(
        self,
        *,
        topk: int,
        signal: Any = None,
        max_sold_weight: float = 1.0,
        risk_degree: float = 0.95,
        buy_method: Literal["first_fill", "average_fill"] = "first_fill",
        at_trade_prices: bool = True,
    ) -> None:
        super().__init__(signal=signal, risk_degree=risk_degree)
        _check_count("topk", topk, 1)
        check_name("buy_method", buy_method, ("first_fill", "average_fill"))
        if not 0 < max_sold_weight <= 1:
            raise ConfigError(
                f"max_sold_weight={max_sold_weight!r}: expected a fraction above 0 and at most 1."
            )
        self.topk, self.max_sold_weight = topk, max_sold_weight
        self.buy_method, self.at_trade_prices = buy_method, at_trade_prices

    def start(
        self,
        exchange: Exchange,
        instruments: pd.Index,
        dates: pd.DatetimeIndex,
        universe: Bools,
    ) -> None:
        _check_universe(self.topk, universe)

    def target_weights(self, context: StepContext) -> Floats:
        assert context.score is not None
        value = np.nan_to_num(context.account.amount * context.account.price)
        weights = np.full(context.score.shape, np.nan)
        for member, score in enumerate(context.score):
            columns = np.flatnonzero(~np.isnan(score))
            if len(columns):
                order = np.argsort(-score[columns], kind="stable")
                best = columns[order[: self.topk]]
                weights[member] = self._move_weights(value[member], best)
        return weights

    def _move_weights(self, value: Floats, best: Indices) -> Floats:
        """Return the target weights `[N]` from the value of the holdings `[N]`, best first."""
        if not value.any():
            equal_weights = np.zeros_like(value)
            equal_weights[best] = 1 / self.topk
            return equal_weights
        weights: Floats = value / value.sum()
        losses = np.minimum(weights, self.max_sold_weight)
        losses[best] = 0.0
        weights -= losses
        if self.buy_method == "average_fill":
            weights[best] += losses.sum() / len(best)
        else:
            room = np.maximum(1 / self.topk - weights[best], 0.0)
            earlier = np.cumsum(room) - room  # the room of those that are filled before
            weights[best] += np.clip(losses.sum() - earlier, 0.0, room)
        return weights

    def target_amounts(self, weights: Floats, context: StepContext) -> Floats:
        if not self.at_trade_prices:
            return super().target_amounts(weights, context)
        account, market, exchange = context.account, context.market, context.market.exchange
        is_tradable = market.is_tradable()
        price = market.price("sell")
        value = np.nan_to_num(account.amount * np.where(np.isnan(price), account.price, price))
        reserve = (1.0 - self.read_risk_degree(context.step)) * (
            value.sum(axis=1) + account.cash + account.unsettled_cash
        )
        budget = np.where(is_tradable, value, 0.0).sum(axis=1) + account.cash - reserve
        budget = np.maximum(budget, 0.0) / (1 + max(exchange.open_cost, exchange.close_cost))
        weights = np.where(is_tradable, weights, 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            part = budget[:, None] * weights / weights.sum(axis=1, keepdims=True)
            amount = part / market.price("buy")
            if context.as_qlib:
                amount = part // market.price("buy")
        target: Floats = np.nan_to_num(amount, posinf=0.0)
        return target


class LongShortStrategy(WeightStrategyBase):
    """Long the best scores and short the worst, equally weighted, both sides of equal value.

    Each side holds `topk` instruments, or the fraction `quantile` of those with a score (rounded
    down, at least one), worth half of the account times `risk_degree`. The portfolio is rebalanced
    every `rebalance` bars. Sales beyond a position open a short position: the proceeds become
    cash, and borrowing costs the exchange's `lending_fee`. Equal scores are ranked by instrument
    name.
    """

    allow_short: ClassVar[bool] = True
    needs_signal: ClassVar[bool] = True

    def __init__(
        self,
        *,
        signal: Any = None,
        topk: int | None = None,
        quantile: float = 0.2,
        rebalance: int = 1,
        risk_degree: float = 0.95,
    ) -> None:
        super().__init__(signal=signal, risk_degree=risk_degree)
        if topk is not None and (isinstance(topk, bool) or topk < 1):
            raise ConfigError(f"topk={topk!r}: expected a whole number of at least 1, or null.")
        if not 0 < quantile <= 0.5:
            raise ConfigError(
                f"quantile={quantile!r}: expected a fraction above 0 and at most 0.5."
            )
        if rebalance < 1:
            raise ConfigError(f"rebalance={rebalance!r}: expected a number of bars, at least 1.")
        self.topk, self.quantile, self.rebalance = topk, quantile, rebalance

    def target_weights(self, context: StepContext) -> Floats:
        assert context.score is not None
        weights = np.full(context.score.shape, np.nan)
        if context.step % self.rebalance:
            return weights
        for member, score in enumerate(context.score):
            columns = np.flatnonzero(~np.isnan(score))
            side_count = self.topk or max(1, int(len(columns) * self.quantile))
            if len(columns) < 2 * side_count:
                continue  # not enough instruments for two disjoint sides
            order = columns[np.argsort(-score[columns], kind="stable")]
            weights[member] = 0.0
            weights[member, order[:side_count]] = 0.5 / side_count
            weights[member, order[-side_count:]] = -0.5 / side_count
        return weights
