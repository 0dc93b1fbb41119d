"""One order of one instrument, as Qlib's scripts write it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from qtorch.core.errors import ConfigError, check_name


class OrderDir(IntEnum):
    """The side of an order."""

    SELL = 0
    BUY = 1

    @classmethod
    def parse(cls, direction: Any) -> OrderDir:
        """Return the side of "buy" or "sell", of an OrderDir, or of Qlib's numbers 0 and 1."""
        if isinstance(direction, str):
            check_name("side of an order", direction.lower().strip(), ("buy", "sell"))
            return cls[direction.upper().strip()]
        if isinstance(direction, int | np.integer) and int(direction) in (0, 1):
            return cls(int(direction))
        raise ConfigError(
            f"direction={direction!r}: expected OrderDir.BUY, OrderDir.SELL, 'buy' or 'sell'."
        )


@dataclass
class Order:
    """An order: an amount (adjusted shares, zero or more) of one instrument. Corresponds to Qlib's.

    `start_time` and `end_time` are those of the bar, inclusive; `factor` the adjustment factor.
    """

    stock_id: str
    amount: float
    direction: OrderDir
    start_time: pd.Timestamp | None = None
    end_time: pd.Timestamp | None = None
    deal_amount: float = 0.0
    factor: float | None = None

    SELL: ClassVar[OrderDir] = OrderDir.SELL
    BUY: ClassVar[OrderDir] = OrderDir.BUY

    def __post_init__(self) -> None:
        self.direction = OrderDir.parse(self.direction)

    @property
    def sign(self) -> int:
        """1 for a purchase, -1 for a sale."""
        return 1 if self.direction is OrderDir.BUY else -1

    @property
    def amount_delta(self) -> float:
        """The amount, negative for a sale."""
        return self.amount * self.sign

    @property
    def deal_amount_delta(self) -> float:
        """The executed amount, negative for a sale."""
        return self.deal_amount * self.sign

    @property
    def date(self) -> pd.Timestamp | None:
        """The day of the bar."""
        return None if self.start_time is None else self.start_time.normalize()

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells the order from others: instrument, bar and side."""
        return self.stock_id, self.start_time, self.end_time, self.direction

    @property
    def key_by_day(self) -> tuple[Any, ...]:
        """What tells the order from those of other days: instrument, day and side."""
        return self.stock_id, self.date, self.direction

    @staticmethod
    def parse_dir(direction: Any) -> OrderDir:
        """Return the side of "buy" or "sell", or of a number: positive for a purchase."""
        if isinstance(direction, int | float | np.number) and not isinstance(direction, OrderDir):
            return OrderDir.BUY if direction > 0 else OrderDir.SELL
        return OrderDir.parse(direction)
