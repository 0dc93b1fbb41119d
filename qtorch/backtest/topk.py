"""TopkDropoutStrategy, the strategy of Qlib's benchmarks: hold the top k, replace a few per bar."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pandas as pd

from qtorch.backtest.exchange import Exchange
from qtorch.backtest.orders import Orders
from qtorch.backtest.quotes import Bools, Floats
from qtorch.backtest.strategy import StepContext, Strategy
from qtorch.core.errors import ConfigError, unknown_name


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
        if signal is None:
            raise ConfigError(
                "TopkDropoutStrategy needs a signal: scores, (model, dataset), or <PRED> in a "
                "record."
            )
        for name, minimum, value in (("topk", 1, topk), ("n_drop", 0, n_drop)):
            if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
                raise ConfigError(f"{name}={value!r}: expected a whole number, at least {minimum}.")
        if method_sell not in ("bottom", "random"):
            raise ConfigError(unknown_name("method_sell", method_sell, ("bottom", "random")))
        if method_buy not in ("top", "random"):
            raise ConfigError(unknown_name("method_buy", method_buy, ("top", "random")))
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
