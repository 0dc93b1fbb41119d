"""Strategies that trade towards target weights: given weights, or long-short by score."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pandas as pd

from qtorch.backtest.orders import Orders
from qtorch.backtest.quotes import Floats
from qtorch.backtest.scores import score_frame
from qtorch.backtest.strategy import StepContext, Strategy
from qtorch.core.errors import ConfigError, DataError


class WeightStrategy(Strategy):
    """Trades towards target weights; also the base class of strategies that compute weights.

    `signal`: the target weights as fractions of the account times `risk_degree`, as a series or
    frame by (datetime, instrument), or as a table with one row per date and one column per
    instrument. Like scores, the weights of a bar are traded at the next bar. On a date with
    weights, instruments without a weight are sold; on a date without any weights nothing is
    traded. A subclass computes weights from scores in `target_weights`.

    Amounts are computed from the account's value and the closes of the previous bar, so all that
    the orders know of their own bar is which instruments can be traded. Corresponds to Qlib's
    WeightStrategyBase with OrderGenWOInteract. Difference: if the cash does not cover all
    purchases they are executed in the order of instrument names, while Qlib shuffles them.
    """

    def scores(self) -> pd.DataFrame | None:
        signal = self.signal
        if isinstance(signal, pd.DataFrame) and not isinstance(signal.index, pd.MultiIndex):
            table: Any = signal  # the type stubs do not know that stack() returns a series
            signal = table.stack().rename("weight")
        return None if signal is None else self._validate_weights(score_frame(signal))

    def target_weights(self, context: StepContext) -> Floats:
        """The target weights `[M, N]`; a member whose row is all NaN does not trade."""
        assert context.score is not None
        has_weights = (~np.isnan(context.score)).any(axis=1, keepdims=True)
        return np.where(has_weights, np.nan_to_num(context.score), np.nan)

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

    def _validate_weights(self, weights: pd.DataFrame) -> pd.DataFrame:
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


class LongShortStrategy(WeightStrategy):
    """Long the best scores and short the worst, equally weighted, both sides of equal value.

    Each side holds `topk` instruments, or the fraction `quantile` of those with a score (rounded
    down, at least one), worth half of the account times `risk_degree`. The portfolio is rebalanced
    every `rebalance` bars. Sales beyond a position open a short position: the proceeds become
    cash, and borrowing fees are not modelled. Equal scores are ranked by instrument name.
    """

    allow_short: ClassVar[bool] = True

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
            raise ConfigError("LongShortStrategy needs a signal: scores, or (model, dataset).")
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

    def _validate_weights(self, weights: pd.DataFrame) -> pd.DataFrame:
        return weights  # the signal holds scores, not weights, so there is nothing to validate
