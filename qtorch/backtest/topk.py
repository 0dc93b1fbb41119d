"""The strategy of Qlib's benchmarks: hold the best, replace a few a day."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pandas as pd

from qtorch.backtest.exchange import Exchange
from qtorch.backtest.orders import Orders
from qtorch.backtest.quotes import Bools, Floats
from qtorch.backtest.strategy import Moment, Strategy
from qtorch.core.errors import ConfigError, unknown_name


class TopkDropoutStrategy(Strategy):
    """Holds about `topk` instruments and replaces the `n_drop` worst of them each bar.

    Each bar: candidates are the best instruments that are not held, `n_drop` and the free places
    of them; of candidates and held ones together the worst `n_drop` are sold where they are held;
    the best candidates fill the places. The cash after the sales, times `risk_degree`, is split
    evenly over the purchases. `method_sell` "bottom" or "random" (any `n_drop` held ones),
    `method_buy` "top" or "random" (any of the best `topk`). Nothing is sold before it was held
    for `hold_thresh` bars. `only_tradable`: what cannot be traded at this bar is left out of the
    ranking. `forbid_all_trade_at_limit`: at either limit nothing is traded; else a sale at the
    upper and a purchase at the lower limit goes through. Instruments without a score rank last
    and are never bought. Equal scores rank by name.

    Answers to Qlib's strategy of that name (contrib/strategy/signal_strategy.py). Differences:
    `n_drop=0` keeps all (Qlib sells all); with more held than `topk + n_drop` nothing is bought
    (Qlib's negative slices buy nearly everything); what has no score (NaN) is not bought; random
    choices come from `seed`, the same for every member.
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
                "TopkDropoutStrategy needs signal: scores, (model, dataset), or <PRED> in a record."
            )
        for name, least, value in (("topk", 1, topk), ("n_drop", 0, n_drop)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name}={value!r}: expected a whole number from {least} on.")
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
                "scores and bars."
            )

    def decide(self, now: Moment) -> Orders:
        """Sales of the worst, then purchases of the best, by `[M, N]` masks in rank order."""
        if now.score is None:
            return Orders.none()
        active = (~np.isnan(now.score)).any(axis=1, keepdims=True)  # a member without scores rests
        order = np.argsort(-now.score, axis=1, kind="stable")  # NaN last, equal scores by name
        held = now.account.held
        rank = _Ranking(order, held & active, now.score, self._eligible(now))
        free = self.topk - held.sum(axis=1, keepdims=True)
        today = self._candidates(rank, np.maximum(free + self.n_drop, 0), now)
        sell = self._worst(rank, today, now)
        places = np.maximum(sell.sum(axis=1, keepdims=True) + free, 0)
        buy = today & (np.cumsum(today, axis=1) <= places)
        sales = Orders.at(
            self._may_sell(rank.by_column(sell), now), now.account.amount, buying=False
        )
        return sales.then(self._purchases(rank, buy, now.account.cash + now.proceeds(sales), now))

    def _eligible(self, now: Moment) -> Bools:
        market = now.market
        return market.tradable() if self.only_tradable else np.ones(len(market.close), np.bool_)

    def _candidates(self, rank: _Ranking, most: Floats, now: Moment) -> Bools:
        """Up to `most [M, 1]` instruments that one would buy, in rank order."""
        if self.method_buy == "top":
            able: Bools = rank.scored & rank.eligible & ~rank.held
            able &= np.cumsum(able, axis=1) <= most
            return able
        best = rank.scored & rank.eligible
        best &= np.cumsum(best, axis=1) <= self.topk
        return self._drawn(best & ~rank.held, most, now.step, 0)

    def _worst(self, rank: _Ranking, today: Bools, now: Moment) -> Bools:
        """Up to `n_drop` held instruments to be sold, in rank order."""
        if self.method_sell == "random":
            most = np.full((len(today), 1), self.n_drop)
            return self._drawn(rank.held & rank.eligible, most, now.step, 1)
        both = (rank.held | today) & rank.eligible
        from_behind = np.cumsum(both[:, ::-1], axis=1)[:, ::-1]
        worst: Bools = rank.held & both & (from_behind <= self.n_drop)
        return worst

    def _drawn(self, among: Bools, most: Floats, step: int, which: int) -> Bools:
        """Random choices without replacement; all where there are not enough."""
        out = np.zeros_like(among)
        for member, row in enumerate(among):
            places = np.flatnonzero(row)
            random = np.random.default_rng([self.seed, step, which])
            count = min(int(most[member, 0]), len(places))
            out[member, random.choice(places, count, replace=False)] = True
        return out

    def _may_sell(self, sell: Bools, now: Moment) -> Bools:
        market = now.market
        able = market.tradable(None if self.forbid_all_trade_at_limit else "sell")
        return sell & able & (now.account.count >= self.hold_thresh)

    def _purchases(self, rank: _Ranking, buy: Bools, cash: Floats, now: Moment) -> Orders:
        """Equal shares of the cash, in rank order; the share of what cannot be bought stays."""
        member, place = np.nonzero(buy)
        instrument = rank.order[member, place]
        share = cash * self.risk_degree / np.maximum(buy.sum(axis=1), 1)
        able = now.market.tradable(None if self.forbid_all_trade_at_limit else "buy")[instrument]
        member, instrument = member[able], instrument[able]
        amount = share[member] / now.market.price("buy")[instrument]
        amount = now.market.rounded(amount, instrument)
        return Orders(member, instrument, amount, np.ones(len(member), dtype=np.bool_))


class _Ranking:
    """Masks `[M, N]` in the order of the scores, best first."""

    def __init__(self, order: Any, held: Bools, score: Floats, eligible: Bools) -> None:
        self.order = order
        self.held = np.take_along_axis(held, order, axis=1)
        self.scored = ~np.isnan(np.take_along_axis(score, order, axis=1))
        self.eligible = eligible[order]

    def by_column(self, ranked: Bools) -> Bools:
        """A mask in rank order as one by instrument."""
        out = np.zeros_like(ranked)
        np.put_along_axis(out, self.order, ranked, axis=1)
        return out
