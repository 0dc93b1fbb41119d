"""What a strategy is: from the last bar's scores to this bar's orders."""

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
from qtorch.core.trust import trusted_type


@dataclass(frozen=True)
class Moment:
    """What a strategy decides on, for M members and N instruments.

    `step` counts the bars from 0. `score [M, N]` is that of the bar before (NaN: none); it is
    None where no member has a score, or without a signal. `market` is the bar of the orders,
    `before` the one before it (None at the very first bar of the calendar). `account` is not to
    be changed.
    """

    step: int
    instruments: pd.Index
    score: Floats | None
    market: Market
    before: Market | None
    account: Account

    @property
    def date(self) -> pd.Timestamp:
        """The bar of the orders."""
        return self.market.date

    def proceeds(self, sales: Orders) -> Floats:
        """What sales would bring after costs if they were dealt now, `[M]`; nothing is booked."""
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
            fills = self.market.deal(sales, trial, np.zeros_like(trial.amount))
            np.add.at(total, sales.member, fills.value - fills.cost)
        return total


@trusted_type
class Strategy(Configured, ABC):
    """Decides on the orders of each bar; write one's own by `decide`.

    `signal`: scores as a frame or series by (datetime, instrument), `(model, dataset)`, or None
    for a strategy without scores. A frame of several columns runs that many members at once, an
    account each. `risk_degree` is the share of the value that is invested.
    """

    short: ClassVar[bool] = False
    """Whether sales may go beyond the position."""

    def __init__(self, *, signal: Any = None, risk_degree: float = 0.95) -> None:
        if not isinstance(risk_degree, int | float) or not 0 < risk_degree <= 1:
            raise ConfigError(f"risk_degree={risk_degree!r}: expected a share above 0, at most 1.")
        self.risk_degree = float(risk_degree)
        self.signal = signal

    def scores(self) -> pd.DataFrame | None:
        """The scores by (datetime, instrument), a column a member."""
        return None if self.signal is None else score_frame(self.signal)

    def start(
        self,
        exchange: Exchange,
        instruments: pd.Index,
        dates: pd.DatetimeIndex,
        universe: Bools,
    ) -> None:
        """Called once before the first bar. `dates` are those traded on; `universe [N]` the
        instruments that have bars and, with a signal, scores."""

    @abstractmethod
    def decide(self, now: Moment) -> Orders:
        """The orders of a bar."""
