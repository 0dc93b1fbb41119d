"""The strategy interface: decide the orders of a bar from the scores of the previous bar."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd

from qtorch.backtest.account import Account, Orders
from qtorch.backtest.exchange import Bools, Exchange, Floats
from qtorch.backtest.market import Market
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
    calendar). A strategy must not modify `account`.
    """

    step: int
    instruments: pd.Index
    score: Floats | None
    market: Market
    previous: Market | None
    account: Account

    @property
    def date(self) -> pd.Timestamp:
        """The bar at which the orders are executed."""
        return self.market.date

    def proceeds(self, sales: Orders) -> Floats:
        """The cash `[M]` that sales would yield after costs if executed now; books nothing."""
        total = np.zeros(len(self.account.cash))
        if len(sales.amount):
            trial = replace(copy.deepcopy(self.account), settle_cash=False)
            fills = self.market.execute(sales, trial, np.zeros_like(trial.amount))
            np.add.at(total, sales.member, fills.value - fills.cost)
        return total


@trust_subclasses
class Strategy(Configured, ABC):
    """Decides the orders of each bar. Subclasses implement `decide`.

    `signal`: scores as a frame or series by (datetime, instrument), `(model, dataset)`, or None
    for a strategy without scores. A frame with several columns runs one member per column in the
    same pass, each with its own account. `risk_degree` is the fraction of the account to invest.
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
    """Holds about `topk` instruments and replaces the `n_drop` worst of them on each bar.

    On each bar, the candidates are the best instruments not yet held: `n_drop` of them, plus one
    for each free slot. Candidates and holdings are ranked together, and the holdings among the
    `n_drop` worst are sold; the best candidates fill the free slots. The cash after the sales,
    times `risk_degree`, is split evenly over the purchases. `method_sell`: "bottom", or "random"
    (any `n_drop` holdings); `method_buy`: "top", or "random" (any of the best `topk`). A position
    is not sold before it has been held for `hold_thresh` bars. `only_tradable`: instruments that
    cannot be traded at this bar are excluded from the ranking. `forbid_all_trade_at_limit`: an
    instrument at either price limit is not traded at all; otherwise sales at the upper limit and
    purchases at the lower limit are allowed. Instruments without a score rank last and are never
    bought. Equal scores are ranked by instrument name.

    Corresponds to Qlib's strategy of that name (contrib/strategy/signal_strategy.py). Differences:
    `n_drop=0` sells nothing (Qlib sells everything); with more than `topk + n_drop` holdings
    nothing is bought (Qlib's negative slice buys nearly everything); instruments without a score
    (NaN) are not bought; random choices depend on `seed` and are the same for every member.
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
        for name, minimum, value in (("topk", 1, topk), ("n_drop", 0, n_drop)):
            if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
                raise ConfigError(f"{name}={value!r}: expected a whole number, at least {minimum}.")
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
        if self.topk > universe.sum():
            raise ConfigError(
                f"topk={self.topk} is more than the {int(universe.sum())} instruments that have "
                "both scores and bars."
            )

    def decide(self, context: StepContext) -> Orders:
        """Sell the worst holdings, then buy the best candidates, with `[M, N]` masks by rank."""
        if context.score is None:
            return Orders.empty()
        # Members without any score on this bar do not trade.
        active = (~np.isnan(context.score)).any(axis=1, keepdims=True)
        # NaN comes last; equal scores stay in the order of instrument names.
        order = np.argsort(-context.score, axis=1, kind="stable")
        is_held = context.account.is_held
        rank = _Ranking(order, is_held & active, context.score, self._eligible_mask(context))
        num_free = self.topk - is_held.sum(axis=1, keepdims=True)
        candidates = self._candidates(rank, np.maximum(num_free + self.n_drop, 0), context)
        sell = self._worst(rank, candidates, context)
        num_slots = np.maximum(sell.sum(axis=1, keepdims=True) + num_free, 0)
        buy = candidates & (np.cumsum(candidates, axis=1) <= num_slots)
        sales = Orders.from_mask(
            self._sellable_mask(rank.to_instrument_order(sell), context),
            context.account.amount,
            buying=False,
        )
        return sales.append(
            self._purchases(rank, buy, context.account.cash + context.proceeds(sales), context)
        )

    def _eligible_mask(self, context: StepContext) -> Bools:
        market = context.market
        return market.is_tradable() if self.only_tradable else np.ones(len(market.close), np.bool_)

    def _candidates(self, rank: _Ranking, max_count: Floats, context: StepContext) -> Bools:
        """Up to `max_count [M, 1]` instruments to consider buying, in rank order."""
        if self.method_buy == "top":
            candidates: Bools = rank.has_score & rank.eligible & ~rank.is_held
            candidates &= np.cumsum(candidates, axis=1) <= max_count
            return candidates
        best = rank.has_score & rank.eligible
        best &= np.cumsum(best, axis=1) <= self.topk
        return self._draw_random(best & ~rank.is_held, max_count, context.step, 0)

    def _worst(self, rank: _Ranking, candidates: Bools, context: StepContext) -> Bools:
        """Up to `n_drop` holdings to sell, in rank order."""
        if self.method_sell == "random":
            max_count = np.full((len(candidates), 1), self.n_drop)
            return self._draw_random(rank.is_held & rank.eligible, max_count, context.step, 1)
        is_ranked = (rank.is_held | candidates) & rank.eligible
        rank_from_bottom = np.cumsum(is_ranked[:, ::-1], axis=1)[:, ::-1]
        worst: Bools = rank.is_held & is_ranked & (rank_from_bottom <= self.n_drop)
        return worst

    def _draw_random(self, is_allowed: Bools, max_count: Floats, step: int, stream: int) -> Bools:
        """Draw up to `max_count` of the allowed instruments without replacement.

        `stream` separates the random numbers of purchases (0) and sales (1).
        """
        out = np.zeros_like(is_allowed)
        for member, row in enumerate(is_allowed):
            places = np.flatnonzero(row)
            random = np.random.default_rng([self.seed, step, stream])
            count = min(int(max_count[member, 0]), len(places))
            out[member, random.choice(places, count, replace=False)] = True
        return out

    def _sellable_mask(self, sell: Bools, context: StepContext) -> Bools:
        market = context.market
        is_tradable = market.is_tradable(None if self.forbid_all_trade_at_limit else "sell")
        return sell & is_tradable & (context.account.count >= self.hold_thresh)

    def _purchases(self, rank: _Ranking, buy: Bools, cash: Floats, context: StepContext) -> Orders:
        """Split the cash equally over the purchases, in rank order.

        The share of an instrument that cannot be bought stays in cash.
        """
        member, rank_index = np.nonzero(buy)
        instrument = rank.order[member, rank_index]
        share = cash * self.risk_degree / np.maximum(buy.sum(axis=1), 1)
        can_buy = context.market.is_tradable(None if self.forbid_all_trade_at_limit else "buy")[
            instrument
        ]
        member, instrument = member[can_buy], instrument[can_buy]
        amount = share[member] / context.market.price("buy")[instrument]
        amount = context.market.round_lots(amount, instrument)
        return Orders(member, instrument, amount, np.ones(len(member), dtype=np.bool_))


class _Ranking:
    """Masks `[M, N]` whose columns are in the order of the scores, best first."""

    def __init__(self, order: Any, is_held: Bools, score: Floats, eligible: Bools) -> None:
        self.order = order
        self.is_held = np.take_along_axis(is_held, order, axis=1)
        self.has_score = ~np.isnan(np.take_along_axis(score, order, axis=1))
        self.eligible = eligible[order]

    def to_instrument_order(self, rank_mask: Bools) -> Bools:
        """Convert a mask in rank order to a mask in instrument order."""
        out = np.zeros_like(rank_mask)
        np.put_along_axis(out, self.order, rank_mask, axis=1)
        return out


class WeightStrategyBase(Strategy):
    """Base class of strategies that trade towards target weights; subclasses compute the weights.

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

    @abstractmethod
    def target_weights(self, context: StepContext) -> Floats:
        """Return the target weights `[M, N]` as fractions of the account times `risk_degree`.

        A member whose row is all NaN does not trade.
        """

    def decide(self, context: StepContext) -> Orders:
        """Return the orders that move the positions to the target weights, sales first."""
        if context.score is None and self.signal is not None:
            return Orders.empty()
        account, market = context.account, context.market
        weights = self.target_weights(context)
        has_target = ~np.isnan(weights).all(axis=1, keepdims=True)
        value = np.maximum(account.value(), 0.0)[:, None] * self.risk_degree
        was_tradable = np.zeros_like(market.is_suspended)
        previous_close = np.full_like(market.close, np.nan)
        if context.previous is not None:
            was_tradable, previous_close = (
                context.previous.is_tradable() & market.is_tradable(),
                context.previous.close,
            )
        price = np.where(was_tradable, previous_close, account.price)
        with np.errstate(invalid="ignore"):
            target = np.nan_to_num(value * np.nan_to_num(weights) / price)
        delta = target - account.amount
        rounded_amount = market.round_lots(np.abs(delta), np.arange(delta.shape[1]))
        # Closing a position includes its odd lots, so that order is not rounded.
        size = np.where(target == 0, np.abs(delta), rounded_amount)
        can_trade = has_target & market.is_tradable()
        sales = Orders.from_mask(can_trade & (delta < 0) & (size > 0), size, buying=False)
        return sales.append(
            Orders.from_mask(can_trade & (delta > 0) & (size > 0), size, buying=True)
        )


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


class LongShortStrategy(WeightStrategyBase):
    """Long the best scores and short the worst, equally weighted, both sides of equal value.

    Each side holds `topk` instruments, or the fraction `quantile` of those with a score (rounded
    down, at least one), worth half of the account times `risk_degree`. The portfolio is rebalanced
    every `rebalance` bars. Sales beyond a position open a short position: the proceeds become
    cash, and borrowing fees are not modelled. Equal scores are ranked by instrument name.
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
