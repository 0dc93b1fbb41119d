"""Strategies that hold target weights: a user's own, long-short by score."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pandas as pd

from qtorch.backtest.orders import Orders
from qtorch.backtest.quotes import Floats
from qtorch.backtest.scores import score_frame
from qtorch.backtest.strategy import Moment, Strategy
from qtorch.core.errors import ConfigError, DataError


class WeightStrategy(Strategy):
    """Trades towards target weights; the base of strategies that make their own.

    `signal`: the target weights, shares of the account (after `risk_degree`), as a series or
    frame by (datetime, instrument), or as a table with a row a date and a column an instrument.
    The weights of a bar are traded at the next one, as scores are. On a date with weights what
    has none is sold; on a date without any nothing is done. A subclass makes weights of scores by
    `target_weights`.

    Amounts follow from the account's value and the closes of the bar before, so that the orders
    know nothing of the bar but what can be traded at all. Answers to Qlib's WeightStrategyBase
    with OrderGenWOInteract. Difference: where the cash does not do for all purchases they are
    made in the order of the names, where Qlib shuffles them.
    """

    def scores(self) -> pd.DataFrame | None:
        signal = self.signal
        if isinstance(signal, pd.DataFrame) and not isinstance(signal.index, pd.MultiIndex):
            table: Any = signal  # the stubs do not know that stack() gives a series
            signal = table.stack().rename("weight")
        return None if signal is None else self._checked(score_frame(signal))

    def target_weights(self, now: Moment) -> Floats:
        """The weights to trade to, `[M, N]`; a row of NaN leaves the member as it is."""
        assert now.score is not None
        some = (~np.isnan(now.score)).any(axis=1, keepdims=True)
        return np.where(some, np.nan_to_num(now.score), np.nan)

    def decide(self, now: Moment) -> Orders:
        """Sales first, then purchases, of what the weights ask for."""
        if now.score is None and self.signal is not None:
            return Orders.none()
        account, market = now.account, now.market
        weights = self.target_weights(now)
        moving = ~np.isnan(weights).all(axis=1, keepdims=True)
        value = np.maximum(account.value(), 0.0)[:, None] * self.risk_degree
        known = np.zeros_like(market.suspended)
        last = np.full_like(market.close, np.nan)
        if now.before is not None:
            known, last = now.before.tradable() & market.tradable(), now.before.close
        price = np.where(known, last, account.price)
        with np.errstate(invalid="ignore"):
            target = np.nan_to_num(value * np.nan_to_num(weights) / price)
        delta = target - account.amount
        whole = market.rounded(np.abs(delta), np.arange(delta.shape[1]))
        size = np.where(target == 0, np.abs(delta), whole)  # a position is left odd lots and all
        where = moving & market.tradable()
        sales = Orders.at(where & (delta < 0) & (size > 0), size, buying=False)
        return sales.then(Orders.at(where & (delta > 0) & (size > 0), size, buying=True))

    def _checked(self, weights: pd.DataFrame) -> pd.DataFrame:
        least = float(weights.min().min())
        if least < 0 and not self.short:
            raise DataError(
                f"a target weight is {least:g}; WeightStrategy holds long positions only. "
                "LongShortStrategy sells short."
            )
        total = float(weights.groupby(level=0).sum().max().max())
        if total > 1 + 1e-5:
            raise DataError(
                f"the target weights of a day sum to {total:g}; they are shares of the account "
                "and may sum to 1 at most."
            )
        return weights


class LongShortStrategy(WeightStrategy):
    """Long the best, short the worst scores, with equal weights and equal sums.

    Each side takes `topk` instruments, or the share `quantile` of those with a score (rounded
    down, at least one), and holds half of the account times `risk_degree`; it is traded anew
    every `rebalance` bars. Sales beyond the position open short ones: their proceeds are cash,
    lending fees are not counted. Equal scores rank by name.
    """

    short: ClassVar[bool] = True

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
        if signal is None:
            raise ConfigError("LongShortStrategy needs signal: scores, or (model, dataset).")
        if topk is not None and (isinstance(topk, bool) or topk < 1):
            raise ConfigError(f"topk={topk!r}: expected a whole number from 1 on, or null.")
        if not 0 < quantile <= 0.5:
            raise ConfigError(f"quantile={quantile!r}: expected a share above 0, at most 0.5.")
        if rebalance < 1:
            raise ConfigError(f"rebalance={rebalance!r}: expected a number of bars from 1 on.")
        self.topk, self.quantile, self.rebalance = topk, quantile, rebalance

    def target_weights(self, now: Moment) -> Floats:
        assert now.score is not None
        weights = np.full(now.score.shape, np.nan)
        if now.step % self.rebalance:
            return weights
        for member, score in enumerate(now.score):
            scored = np.flatnonzero(~np.isnan(score))
            side = self.topk or max(1, int(len(scored) * self.quantile))
            if len(scored) < 2 * side:
                continue  # too few to be on both sides
            order = scored[np.argsort(-score[scored], kind="stable")]
            weights[member] = 0.0
            weights[member, order[:side]] = 0.5 / side
            weights[member, order[-side:]] = -0.5 / side
        return weights

    def _checked(self, weights: pd.DataFrame) -> pd.DataFrame:
        return weights  # scores, not weights
