"""The strategy interface: decide the orders of a bar from the scores of the previous bar."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from qtorch.backtest.account import Account
from qtorch.backtest.exchange import Exchange
from qtorch.backtest.market import Market
from qtorch.backtest.orders import Orders
from qtorch.backtest.quotes import Bools, Floats
from qtorch.backtest.scores import score_frame
from qtorch.core.configured import Configured
from qtorch.core.errors import ConfigError
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
            trial = Account(
                self.account.cash.copy(),
                self.account.amount.copy(),
                self.account.price,
                self.account.count,
                False,
                *(np.zeros_like(total) for _ in range(3)),
            )
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

    def __init__(self, *, signal: Any = None, risk_degree: float = 0.95) -> None:
        if not isinstance(risk_degree, int | float) or not 0 < risk_degree <= 1:
            raise ConfigError(
                f"risk_degree={risk_degree!r}: expected a fraction above 0 and at most 1."
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
