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
